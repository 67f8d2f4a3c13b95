"""How an operation computes: the one argument about it that callers hand down."""

from dataclasses import dataclass

import torch

from shared.kernels import linear
from shared.kernels.dispatch import KERNELS

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Compute:
    """Which implementation runs, and in what type its dense products. Raises ValueError for unknown names."""

    kernels: str = "auto"
    """auto, triton, torch or reference; see ``shared.kernels.dispatch.resolve``."""
    dtype: str = "float32"
    """float32 or bfloat16: what that means on each device says the operation's docstring. auto: bfloat16 on a GPU,
    whose float32 product takes fourteen times as long, and float32 elsewhere. bfloat16 is float32 on a processor
    without an instruction for it, where it takes more than twice as long."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kernels", self.kernels, KERNELS),
            ("compute_dtype", self.dtype, COMPUTE_DTYPES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")

    def dtype_for(self, tensor: torch.Tensor) -> str:
        """The type that products with `tensor` have on its device: float32 or bfloat16."""
        if self.dtype == "auto":
            return "bfloat16" if tensor.is_cuda else "float32"
        is_fast = tensor.is_cuda or self.kernels == "triton" or linear.FAST_BFLOAT16
        return self.dtype if is_fast else "float32"


AUTO = Compute()
