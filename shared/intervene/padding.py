"""Which tokens of a forward are padding, from any form of attention mask that transformers gives a model.

Legend: B rows, T positions of the forward, S slots of the cache and the forward together.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError


def padding_of(mask: Any, past: int, shape: torch.Size, device: torch.device) -> Tensor:
    """bool [B, T]: the tokens that are padding, `past` slots of the cache being filled before them.

    `mask` is None; [B, S] of what may be attended to; [B, 1, T, S] or [B, T, S] of who attends to whom, bool or to be
    added to scores; a mapping of kinds of layers to such masks; or a BlockMask of flex_attention. A token that does not
    attend to itself is padding. Raises GranaryError for anything else.
    """
    B, T = shape
    mask = _one_of(mask)
    if mask is None:
        return torch.zeros(B, T, dtype=torch.bool, device=device)
    slots_T = torch.arange(T, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return _as_rows(mask[:, past : past + T] == 0, B)
    if isinstance(mask, Tensor) and mask.dim() in (3, 4):
        square_BTS = mask[:, 0] if mask.dim() == 4 else mask
        own_BT = square_BTS[:, slots_T, slots_T + past]
        return _as_rows(~own_BT if own_BT.dtype == torch.bool else own_BT < HIDDEN, B)
    if hasattr(mask, "mask_mod"):
        rows_B1 = torch.arange(B, device=device)[:, None]
        return ~mask.mask_mod(rows_B1, torch.zeros_like(rows_B1), slots_T[None], slots_T[None] + past).expand(B, T)
    raise GranaryError(
        f"an attention_mask of type {type(mask).__name__} does not say which tokens are padding: give [rows, tokens]"
    )


def attended(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """bool [B, T, T]: which tokens each one sees, by a mask that says of all of them; `shape` is [B, T].

    The forms are those of `padding_of`, but for [B, S]. Raises GranaryError for others.
    """
    B, T = shape
    mask = _one_of(mask)
    if isinstance(mask, Tensor) and mask.dim() in (3, 4):
        square_BTS = mask[:, 0] if mask.dim() == 4 else mask
        seen_BTT = (square_BTS if square_BTS.dtype == torch.bool else square_BTS >= HIDDEN)[..., :T]
        if seen_BTT.shape[1:] == (T, T):
            return seen_BTT.expand(B, -1, -1).to(device)
    if hasattr(mask, "mask_mod"):
        index_T = torch.arange(T, device=device)
        rows_B11 = torch.arange(B, device=device)[:, None, None]
        seen: Tensor = mask.mask_mod(rows_B11, torch.zeros_like(rows_B11), index_T[:, None], index_T)
        return seen.expand(B, T, T)
    raise GranaryError(f"an attention_mask of type {type(mask).__name__} does not say which tokens see one another")


def _one_of(mask: Any) -> Any:
    """The mask of layers that see everything, or else any, where kinds of layers have one each."""
    if not isinstance(mask, Mapping):
        return mask
    known = [mask.get("full_attention"), *mask.values()]
    return next((one for one in known if one is not None), None)


# What is added to a score to hide it is the least number of its type; position biases are nowhere near.
HIDDEN = -1e4


def _as_rows(padding: Tensor, rows: int) -> Tensor:
    return padding.expand(rows, -1)
