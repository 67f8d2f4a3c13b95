"""Which latents fire together: counts and products over the sampled tokens, a block of latents with all at a time.

N tokens of the sample, n_i tokens on which latent i fires, C_ij on which both do. Jaccard C / (n_i + n_j - C); NPMI
ln(N C / (n_i n_j)) / -ln(C / N) (Bouma 2009); Pearson of the activations over all N tokens, zeros included. Pairs with
C below `LEAST` are left out.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shared.latents.layout import NEAREST, NONE
from stage_inspect.scan.log import Columns
from stage_inspect.scan.pairs import Ints, lengths, ragged, stable_order, starts_of

LEAST = 5
CELLS = 1 << 22  # of a block's table of pairs
PAIRS = 1 << 22  # looked at together

Doubles = npt.NDArray[np.float64]


def together(count_N: Ints, latent: Ints, value: Doubles, num_latents: int) -> Iterator[Columns]:
    """Rows of ``together/*`` in blocks. `count_N` latents fire on each token: the next entries of `latent`, `value`."""
    N, F = len(count_N), num_latents
    first_N = np.cumsum(count_N) - count_N
    fired = np.bincount(latent, minlength=F)
    sums = np.bincount(latent, weights=value, minlength=F)
    spread = np.sqrt(np.maximum(N * np.bincount(latent, weights=value**2, minlength=F) - sums**2, 0))
    order = stable_order(latent, F)
    token = np.repeat(np.arange(N), count_N)[order]
    ends = np.append(0, np.cumsum(fired))
    rows = max(1, CELLS // F)
    for start in range(0, F, rows):
        stop = min(start + rows, F)
        own = order[ends[start] : ends[stop]]
        tokens = token[ends[start] : ends[stop]]
        i, j, both, product = _pairs(own, tokens, start, stop, first_N, count_N, latent, value, F)
        keep = (both >= LEAST) & (i != j)
        i, j, both, product = i[keep], j[keep], both[keep].astype(np.float64), product[keep]
        with np.errstate(divide="ignore", invalid="ignore"):
            npmi = np.where(both == N, 1, np.log(N * both / (fired[i] * fired[j])) / -np.log(both / N))
            pearson = np.where(
                spread[i] * spread[j] > 0, (N * product - sums[i] * sums[j]) / (spread[i] * spread[j]), 0
            )
        columns: Columns = {"together/fired": fired[start:stop].astype(np.uint32)}
        for name, score, counted in (
            ("jaccard", both / (fired[i] + fired[j] - both), True),
            ("npmi", npmi, True),
            ("pearson", pearson, False),
        ):
            columns |= _nearest(f"together/{name}", i - start, j, score, both if counted else None, stop - start)
        yield columns


def _pairs(
    own: Ints, tokens: Ints, start: int, stop: int, first_N: Ints, count_N: Ints, latent: Ints, value: Doubles, F: int
) -> tuple[Ints, Ints, Ints, Doubles]:
    """Latents i of the block, latents j, tokens on which both fire, sum of the products of their activations."""
    counts, products = np.zeros((stop - start) * F, np.int64), np.zeros((stop - start) * F)
    work = np.cumsum(count_N[tokens])
    cuts = np.unique(np.searchsorted(work, np.arange(0, (work[-1] if len(work) else 0) + PAIRS, PAIRS)))
    for low, high in zip(cuts, [*cuts[1:], len(own)], strict=True):
        if low == high:
            continue
        width = count_N[tokens[low:high]]
        other = ragged(first_N[tokens[low:high]], width)
        mine = np.repeat(own[low:high], width)
        cell = (latent[mine] - start) * F + latent[other]
        cells, inverse = (None, cell) if len(cell) > len(counts) // 8 else np.unique(cell, return_inverse=True)
        size = len(counts) if cells is None else len(cells)
        where = slice(None) if cells is None else cells
        counts[where] += np.bincount(inverse, minlength=size)
        products[where] += np.bincount(inverse, weights=value[mine] * value[other], minlength=size)
    found = np.flatnonzero(counts)
    return found // F + start, found % F, counts[found], products[found]


def _nearest(name: str, row: Ints, other: Ints, score: Doubles, count: Doubles | None, rows: int) -> Columns:
    """The `NEAREST` of the highest scores of each row; the smaller latent at a tie."""
    order = np.lexsort((other, -score, row))
    starts = starts_of(row[order])
    rank = np.arange(len(row)) - np.repeat(starts, lengths(starts, len(row)))
    kept = order[rank < NEAREST]
    at = (row[kept], rank[rank < NEAREST])
    latents, scores = np.full((rows, NEAREST), NONE, np.int32), np.zeros((rows, NEAREST), np.float32)
    latents[at], scores[at] = other[kept], score[kept]
    columns: Columns = {f"{name}_latent": latents, name: scores}
    if count is not None:
        counts = np.zeros((rows, NEAREST), np.uint32)
        counts[at] = count[kept]
        columns[f"{name}_count"] = counts
    return columns
