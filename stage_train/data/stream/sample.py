"""A few tokens from all over the data, for whatever must look at activations before the first step."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.store import DamagedObjectError
from shared.store.buffers import empty_to_read
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.permutation import Purpose, random_order

# Contexts a sample of tokens is spread over at most: each is read whole.
SAMPLE_CONTEXTS = 16

Formats = Mapping[str, tuple[int, torch.dtype]]
"""(Width, dtype that is read) of every site."""


def sample_tokens(
    data: TrainingData, sites: Formats, count: int, seed: int, *, skip_damaged: bool = False
) -> dict[str, Tensor]:
    """About `count` trainable tokens, float32 [n, width] for every site, a pure function of the data and the seed.

    Row i is the same token at all sites. The tokens come from up to 16 random contexts, equally many from each that has
    enough. n is at most `count`, and less where those contexts hold fewer tokens, or are damaged at some site and to be
    skipped (then the stream says which).
    """
    rows = data.rows_of_epoch(seed, 0)
    chosen = rows[random_order(len(rows), Purpose.SAMPLE, seed, 0)[:SAMPLE_CONTEXTS]]
    share = -(-count // len(chosen))
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for number, contexts in _read(data, sites, chosen, skip_damaged=skip_damaged):
        positions = data.positions(int(chosen[number]))
        picked = positions[random_order(len(positions), Purpose.SAMPLE, seed, 0, 1, number)[:share]]
        for site, context_T_D in contexts.items():
            parts[site].append(context_T_D[torch.from_numpy(picked)].float())
    return {site: torch.cat(pieces)[:count] for site, pieces in parts.items()}


def sample_contexts(
    data: TrainingData, sites: Formats, count: int, seed: int, *, skip_damaged: bool = False
) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
    """Random whole contexts of `count` positions together, one at least: float32 [n, T, width] for every site, and
    which rows of the data they are. A pure function of the data and the seed; damaged ones as in ``sample_tokens``.
    """
    rows = data.rows_of_epoch(seed, 0)
    chosen = rows[random_order(len(rows), Purpose.SAMPLE, seed, 0)[: max(1, count // data.seq_len)]]
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    kept = []
    for number, contexts in _read(data, sites, chosen, skip_damaged=skip_damaged):
        kept.append(number)
        for site, context_T_D in contexts.items():
            parts[site].append(context_T_D.float())
    return {site: torch.stack(pieces) for site, pieces in parts.items()}, chosen[kept]


def _read(
    data: TrainingData, sites: Formats, rows: NDArray[np.int64], *, skip_damaged: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(Number among the `rows`, activations [T, width] of every site, overwritten by the next) of what can be read.

    Raises DamagedObjectError where it is not to be skipped, and where there is nothing but damage.
    """
    contexts = {site: empty_to_read((data.seq_len, width), dtype) for site, (width, dtype) in sites.items()}
    found = False
    for number, row in enumerate(rows.tolist()):
        try:
            for site, context_T_D in contexts.items():
                data.read(row, site, context_T_D)
        except DamagedObjectError:
            if not skip_damaged or (not found and number == len(rows) - 1):
                raise
            continue
        found = True
        yield number, contexts
