"""A few tokens from all over the data, for whatever must look at activations before the first step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.store import DamagedObjectError
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.permutation import Purpose, random_order

# Contexts a sample is spread over at most: each is read whole.
SAMPLE_CONTEXTS = 16


def sample_tokens(
    data: TrainingData,
    sites: Mapping[str, tuple[int, torch.dtype]],
    count: int,
    seed: int,
    *,
    skip_damaged: bool = False,
) -> dict[str, Tensor]:
    """About `count` trainable tokens, float32 [n, width] for every site, a pure function of the data and the seed.

    `sites` maps each site to (width, dtype read); row i is the same token at all of them. The tokens come from up to 16
    random contexts, equally many from each that has enough. n is at most `count`, and less where those contexts hold
    fewer tokens, or are damaged at some site and to be skipped (then the stream says which).
    """
    rows = data.rows_of_epoch(seed, 0)
    chosen = rows[random_order(len(rows), Purpose.SAMPLE, seed, 0)[:SAMPLE_CONTEXTS]]
    contexts = {site: torch.empty(data.seq_len, width, dtype=dtype) for site, (width, dtype) in sites.items()}
    share = -(-count // len(chosen))
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for number, row in enumerate(chosen.tolist()):
        positions = data.positions(row)
        picked = positions[random_order(len(positions), Purpose.SAMPLE, seed, 0, 1, number)[:share]]
        try:
            for site, context_T_D in contexts.items():
                data.read(row, site, context_T_D)
        except DamagedObjectError:
            empty = not any(parts.values())
            if not skip_damaged or (empty and number == len(chosen) - 1):
                raise
            continue
        for site, context_T_D in contexts.items():
            parts[site].append(context_T_D[torch.from_numpy(picked)].float())
    return {site: torch.cat(pieces)[:count] for site, pieces in parts.items()}
