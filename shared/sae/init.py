"""Starting values: directions, bias and scale."""

from typing import Any, Protocol

import torch


class ActivationStatistics(Protocol):
    """What initialisation reads of an activation store's statistics; arrays or tensors."""

    @property
    def mean(self) -> Any:
        """[D]."""

    @property
    def var(self) -> Any:
        """[D]."""

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a token."""


@torch.no_grad()
def random_unit_rows(W_FD: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Fill `W_FD` in place with rows uniform on the unit sphere."""
    W_FD.normal_(generator=generator)
    W_FD.div_(W_FD.norm(dim=1, keepdim=True))


def geometric_median(points_MD: torch.Tensor, *, max_steps: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point [D] with the least summed distance to `points_MD` (Weiszfeld 1937), in float32 or better.

    Stops when a step moves it by less than `tolerance` times the mean distance.
    """
    points_MD = points_MD.to(torch.promote_types(points_MD.dtype, torch.float32))
    median_D = points_MD.mean(0)
    for _ in range(max_steps):
        distance_M = (points_MD - median_D).norm(dim=1)
        # A point on the median would get infinite weight and hold it there for ever.
        weight_M = 1 / distance_M.clamp_min(1e-6 * float(distance_M.mean()) + torch.finfo(points_MD.dtype).tiny)
        moved_D = weight_M @ points_MD / weight_M.sum()
        step = float((moved_D - median_D).norm())
        median_D = moved_D
        if step <= tolerance * float(distance_M.mean()):
            break
    return median_D


def encoder_scale(target_MD: torch.Tensor, decoded_MD: torch.Tensor, weight_D: torch.Tensor) -> float:
    """argmin_s of ``sum w (target - s * decoded)^2``.

    With b_enc = 0 the choice of latents does not depend on the encoder's scale and the reconstruction is linear in it,
    so the best scale has this closed form; other projects search it on a grid.
    """
    scale = float((target_MD * decoded_MD * weight_D).sum() / (decoded_MD.square() * weight_D).sum())
    return scale if scale > 0 else 1.0
