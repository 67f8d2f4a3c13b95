"""Rope variants whose angles depend on the longest position of a forward, made a function of each document alone.

longrope (Phi 3 and 4) has two sets of frequencies, for sequences within the original number of positions and beyond it,
and chooses one for the whole forward: a long document would change its short neighbours. dynamic stretches frequencies
by the longest sequence that it has met, so a document would also change those that are run after it.

Shapes: B contexts, T positions, E head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BY_LENGTH = ("longrope", "dynamic")
# What such a module of transformers keeps between forwards; of several kinds of layers, each under a prefix.
ORIGINAL, LONGEST = "original_inv_freq", "max_seq_len_cached"

Rotary = Callable[..., tuple[Tensor, Tensor]]


def rotate_by_document(model: nn.Module) -> None:
    """Let every rotary module of `model` that looks at the longest position look at one document at a time."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        if any(kind in BY_LENGTH for kind in kinds):
            module.forward = partial(_by_document, partial(_anew, module, module.forward))


def _anew(
    module: nn.Module, rotary: Rotary, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Cosines and sines as of a module that has met no sequence yet."""
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith(ORIGINAL):
            # A copy, since newer versions of transformers write the frequencies of a long sequence into it.
            module.register_buffer(f"{name.removesuffix(ORIGINAL)}inv_freq", original.clone(), persistent=False)
    for name in vars(module):
        if name.endswith(LONGEST):
            setattr(module, name, module.original_max_seq_len)
    return rotary(x, position_ids, *args, **kwargs)


def _by_document(rotary: Rotary, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, E] of `position_ids` [B, T], which restart at 0 where a document begins."""
    is_start_BT = position_ids == 0
    is_start_BT[:, 0] = True
    if int(is_start_BT.sum()) == len(position_ids):  # one document per row, all of one length
        return rotary(x, position_ids, *args, **kwargs)
    cosines, sines = [], []
    for is_start_T, positions_T in zip(is_start_BT.cpu(), position_ids, strict=True):
        starts = torch.nonzero(is_start_T).flatten().tolist()
        ends = [*starts[1:], len(positions_T)]
        parts = [rotary(x[:1], positions_T[None, a:b], *args, **kwargs) for a, b in zip(starts, ends, strict=True)]
        cosines.append(torch.cat([cos for cos, _ in parts], dim=1))
        sines.append(torch.cat([sin for _, sin in parts], dim=1))
    return torch.cat(cosines), torch.cat(sines)
