"""Closeness of two results that add the same terms in another order.

Ranks, micro-batches, packed runs and other processors reorder sums. Most elements then agree to a few units of
rounding, but a bound on every element fails on some processor for the one element whose terms cancel. A bound on the
norm of the difference does not, and still finds any term that is missing or counted twice.
"""

import torch
from torch import Tensor

# For the weights of two runs of tens of steps over the same batches. Adam divides a gradient by its own size, so where
# a gradient's terms cancel to rounding error, the order of its sum decides a part of a step: single elements differ by
# 1e-5 then, the whole by at most 4e-7 as measured. A step left out of ten differs by more than 1e-3.
SAME_RUN = 1e-5
REORDERED = "which differ by the order of their float32 sums"


def difference_in_norm(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ over all elements, in float64: 0 where both are zero, NaN where one has NaN."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double())) if difference != 0 else 0.0


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float, why: str) -> None:
    """The difference in norm is at most `bound`; `why` says what it allows for, and is part of the message."""
    found = difference_in_norm(actual, expected)
    assert found <= bound, f"differs by {found:.2g} in norm, more than {bound:.2g}: {why}"
