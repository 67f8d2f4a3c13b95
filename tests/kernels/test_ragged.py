"""Places of true entries, against ``nonzero``."""

import pytest
import torch

from shared.kernels.ragged import FEW, true_places


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (5, 7), (4, 8), (63, 500), (100, 1501), (64, 4096)])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5 / FEW, 2.0 / FEW, 0.3, 1.0])
def test_true_places_are_those_of_nonzero(shape: tuple[int, int], share: float) -> None:
    kept_TF = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    for found_P, expected_P in zip(true_places(kept_TF), kept_TF.nonzero(as_tuple=True), strict=True):
        assert torch.equal(found_P, expected_P)
