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
CELLS = 1 << 20  # of a block's table of pairs
PAIRS = 1 << 22  # terms looked at together
FILLED = 1 / 8  # terms per cell from which a table of all cells costs less than sorting the terms

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
    terms = np.append(0, np.cumsum(count_N[token]))[ends]
    start = 0
    while start < F:
        stop, is_table = _block(start, terms, F)
        own = order[ends[start] : ends[stop]]
        tokens = token[ends[start] : ends[stop]]
        find = _pairs_by_table if is_table else _pairs_by_sorting
        i, j, both, product = find(own, tokens, start, stop, first_N, count_N, latent, value, F)
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
        start = stop


def _block(start: int, terms: Ints, F: int) -> tuple[int, bool]:
    """Where the block from latent `start` on ends, and whether its pairs are counted in a table of all cells.

    `terms` [F + 1]: terms before each latent. A table is gone over whole, which among many latents that seldom meet
    takes longer than sorting what there is; a block is then as long as its terms allow.
    """
    stop = min(start + max(1, CELLS // F), F)
    if terms[stop] - terms[start] >= FILLED * (stop - start) * F:
        return stop, True
    # Some latents at least: the terms of all up to `stop` are fewer than cells.
    return max(stop, int(np.searchsorted(terms, terms[start] + PAIRS, side="right")) - 1), False


def _pairs_by_sorting(
    own: Ints, tokens: Ints, start: int, stop: int, first_N: Ints, count_N: Ints, latent: Ints, value: Doubles, F: int
) -> tuple[Ints, Ints, Ints, Doubles]:
    """As `_pairs_by_table`."""
    width = count_N[tokens]
    other = ragged(first_N[tokens], width)
    mine = np.repeat(own, width)
    bits = np.uint64(len(other).bit_length())
    # The number of each term below its cell: one sort of integers, and terms of a cell stay in the order of tokens.
    keys = ((latent[mine] - start) * F + latent[other]).astype(np.uint64) << bits
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    term = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    cell = (keys >> bits).astype(np.int64)
    starts = starts_of(cell)
    both = lengths(starts, len(cell))
    run = np.repeat(np.arange(len(starts)), both)
    product: Doubles = np.bincount(run, weights=value[mine[term]] * value[other[term]]).astype(np.float64)
    found = cell[starts]
    return found // F + start, found % F, both, product


def _pairs_by_table(
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
        counts += np.bincount(cell, minlength=len(counts))
        products += np.bincount(cell, weights=value[mine] * value[other], minlength=len(counts))
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
