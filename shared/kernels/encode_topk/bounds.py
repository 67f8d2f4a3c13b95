"""Upper bounds of float32 pre-activations by a bfloat16 product, on a CPU: what can't be picked is left out for good.

With x', w' for x, w in bfloat16, by Cauchy-Schwarz,

    |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|

and the four norms are measured, once per step. What the sums of float32 round, here and in ``exact_values``, is at most
(D + 8) 2^-24 |x| |w| in each, whatever their order. The bound goes into the product as a bias, where it costs nothing.

Shapes: N rows, D d_model, F latents, T rows of a tile, P pairs.
"""

from collections.abc import Callable, Iterator

import torch

from shared.kernels import linear as product
from shared.kernels.decode.torch_ import pair_dots
from shared.kernels.ragged import true_places

# Elements of one tile of pre-activations. Large enough for the matrix product to run at full speed, small enough that
# the tile is still in the last-level cache when the selection reads it.
TILE_ELEMENTS = 1 << 22
# The same where every tile reads a matrix of so many elements from memory anew: fewer tiles then save more.
LARGE_TILE_ELEMENTS, LARGE_WEIGHT = 6 << 20, 1 << 24
# Elements of a tile of rows on their way to bfloat16.
ROUNDED_ELEMENTS = 1 << 18
# What is stored in bfloat16 differs from the number that was rounded by at most this part of itself: 8 bits.
ROUNDING = 2.0**-8
# Elements of W from which on bounds save time: measured, they cost it at 2^20 and save it at 2^23.
SMALLEST_WEIGHT = 1 << 22
# With more than one pair in so many above the bar, bounds save nothing.
MANY = 64
# More than underflow can hide, in a norm and in a sum.
HIDDEN_IN_NORM, HIDDEN_IN_SUM = 2.0**-55, 2.0**-100


class Bounds:
    """Makes upper bounds of the pre-activations of any rows. They share the slack of the longest of them, so ``tiles``
    puts rows together whose norms are within a factor of two, the longest first."""

    def __init__(self, x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor) -> None:
        self._x_ND, norm_N, lost_N = _round(x_ND)
        self._W_FD, self._norm_F, self._lost_F = _round(W_FD)
        self._b_F = b_F
        self._norm_N, self._lost_N = norm_N, lost_N + norm_N * ((x_ND.shape[1] + 8) * 2.0**-23)

    def tiles(self) -> list[torch.Tensor]:
        """Rows [T] of every tile."""
        num_latents = self._W_FD.shape[0]
        norm_N, order_N = self._norm_N.sort(descending=True, stable=True)
        _, counts = torch.frexp(norm_N).exponent.unique_consecutive(return_counts=True)
        return [tile for rows in order_N.split(counts.tolist()) for tile in _tiles(rows, num_latents, TILE_ELEMENTS)]

    def of(self, rows_T: torch.Tensor) -> torch.Tensor:
        """u [T, F] in bfloat16 with ``z <= u + ROUNDING |u|`` for z in float32; NaN where there is no finite bound."""
        slack_F = self._lost_N[rows_T].amax() * self._norm_F + self._norm_N[rows_T].amax() * self._lost_F
        slack_F += self._b_F.abs() * 2.0**-22
        # The factor covers the rounding of the norms and of this sum.
        bias_F = self._b_F + (slack_F * (1.01 + self._x_ND.shape[1] * 2.0**-22) + HIDDEN_IN_SUM)
        bias_F = (bias_F + bias_F.abs() * (2 * ROUNDING)).bfloat16()  # never below the sum
        upper_TF = product.linear(self._x_ND[rows_T], self._W_FD, bias_F)
        return upper_TF if bool(bias_F.isfinite().all()) else upper_TF.fill_(torch.nan)


def bounds_pay(x_ND: torch.Tensor, W_FD: torch.Tensor) -> bool:
    """Whether bounds save time: on a processor that is fast at bfloat16, and where the product is most of the work."""
    return product.FAST_BFLOAT16 and W_FD.numel() >= SMALLEST_WEIGHT and bounds_apply(x_ND)


def bounds_apply(x_ND: torch.Tensor) -> bool:
    """Whether there can be bounds: for float32 on a CPU whose bfloat16 products are known to add up in float32."""
    return product.HAS_BFLOAT16 and x_ND.dtype == torch.float32 and not x_ND.is_cuda


def row_tiles(x_ND: torch.Tensor, W_FD: torch.Tensor) -> list[torch.Tensor]:
    """Rows [T] of every tile, in order."""
    elements = TILE_ELEMENTS if W_FD.numel() <= LARGE_WEIGHT else LARGE_TILE_ELEMENTS
    return _tiles(torch.arange(x_ND.shape[0], device=x_ND.device), W_FD.shape[0], elements)


def pairs_from(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, compute_dtype: str, bar: Callable[[], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Iterates over (rows_P, latents_P, z_P) of the pairs with z not below the bar, a tile of rows at a time.

    `bar` is asked for it, a scalar or [F], before each tile. Without bounds rows come in order.
    """
    asked = compute_dtype == "bfloat16" and bounds_apply(x_ND)
    bounds = Bounds(x_ND, W_FD, b_F) if asked or bounds_pay(x_ND, W_FD) else None
    many = False  # where many pairs pass, the float32 product costs less than theirs alone
    for rows_T in row_tiles(x_ND, W_FD) if bounds is None else bounds.tiles():
        bar_F = bar()
        if bounds is not None and not many:
            passes_TF = ~(bounds.of(rows_T) < (bar_F * (1 - 4 * ROUNDING * bar_F.sign())).bfloat16())
            many = int(passes_TF.count_nonzero()) * MANY > passes_TF.numel()  # sum() would copy all of it to int64
            if not many:
                places_P, latents_P = true_places(passes_TF)
                yield rows_T[places_P], latents_P, exact_values(x_ND, W_FD, b_F, rows_T[places_P], latents_P)
                continue
        z_TF = product.linear(x_ND[rows_T], W_FD, b_F)
        passes_TF = ~(z_TF < bar_F)
        places_P, latents_P = true_places(passes_TF)
        many = len(places_P) * MANY > passes_TF.numel()
        yield rows_T[places_P], latents_P, z_TF[places_P, latents_P]


def exact_values(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, rows_P: torch.Tensor, latents_P: torch.Tensor
) -> torch.Tensor:
    """``x[row] . W[latent] + b[latent]`` of the pairs, in the type of the inputs, [P]."""
    return pair_dots(x_ND, W_FD, rows_P, latents_P) + b_F[latents_P]


def _tiles(rows_N: torch.Tensor, num_latents: int, elements: int) -> list[torch.Tensor]:
    return list(rows_N.split(max(1, elements // num_latents))) if rows_N.numel() else []


def _round(rows_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in bfloat16; upper bounds of their norms, before and after, and of the norm of what rounding took, [R]."""
    rounded_RD = torch.empty_like(rows_RD, dtype=torch.bfloat16)
    norm_R, lost_R = rows_RD.new_empty(len(rows_RD)), rows_RD.new_empty(len(rows_RD))
    tile_rows = max(1, ROUNDED_ELEMENTS // rows_RD.shape[1])
    for start in range(0, len(rows_RD), tile_rows):
        part = slice(start, start + tile_rows)
        rounded_RD[part] = rows_RD[part]
        torch.linalg.vector_norm(rows_RD[part], dim=1, out=norm_R[part])
        torch.linalg.vector_norm(rows_RD[part] - rounded_RD[part], dim=1, out=lost_R[part])
    lost_R += HIDDEN_IN_NORM
    return rounded_RD, norm_R + lost_R, lost_R
