"""A few tokens from all over the data, for whatever must look at activations before the first step."""

import torch
from torch import Tensor

from shared.store import DamagedObjectError
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.permutation import Purpose, random_order

# Contexts a sample is spread over at most: each is read whole.
SAMPLE_CONTEXTS = 16


def sample_tokens(
    data: TrainingData,
    hook: str,
    width: int,
    dtype: torch.dtype,
    count: int,
    seed: int,
    *,
    skip_damaged: bool = False,
) -> Tensor:
    """About `count` trainable activations, float32 [n, width], a pure function of the data and the seed.

    They come from up to 16 random contexts, equally many from each that has enough. n is at most `count`, and less
    where those contexts hold fewer tokens, or are damaged and to be skipped (then the stream says which).
    """
    rows = data.rows_of_epoch(seed, 0)
    chosen = rows[random_order(len(rows), Purpose.SAMPLE, seed, 0)[:SAMPLE_CONTEXTS]]
    context_T_D = torch.empty(data.seq_len, width, dtype=dtype)
    share = -(-count // len(chosen))
    parts: list[Tensor] = []
    for number, row in enumerate(chosen.tolist()):
        positions = data.positions(row)
        picked = positions[random_order(len(positions), Purpose.SAMPLE, seed, 0, 1, number)[:share]]
        try:
            data.read(row, hook, context_T_D)
        except DamagedObjectError:
            if not skip_damaged or (not parts and number == len(chosen) - 1):
                raise
            continue
        parts.append(context_T_D[torch.from_numpy(picked)].float())
    return torch.cat(parts)[:count]
