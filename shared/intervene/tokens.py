"""Which positions of a language model's forward hold tokens that dictionaries are trained on.

Legend: B rows, T positions of the forward.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.intervene.padding import padding_of
from shared.lm.calls import filled_slots, named_arguments

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def of_activation(tokens_BT: Tensor, activation: Tensor) -> Tensor | None:
    """What is said of each token, [B, T], for the positions of an activation [..., D], as its shape without D.

    None where these are not the tokens of the forward, as in a vision tower: they have another shape then.
    """
    found = of_rows(tokens_BT, activation.shape[:-1])
    return None if found is None else found.to(activation.device)


def of_rows(tokens_BT: Tensor, shape: torch.Size) -> Tensor | None:
    """The same for an activation that has `shape` before its features."""
    return tokens_BT.reshape(shape) if shape in (tokens_BT.shape, (tokens_BT.numel(),)) else None


def real_tokens(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """bool [B, T]: neither padding nor special (BOS, EOS, padding of the model's configuration).

    None where the forward is not one of a transformers model over tokens.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    named = named_arguments(model, args, kwargs)
    ids = named.get("input_ids")
    given = ids if isinstance(ids, Tensor) else named.get("inputs_embeds")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    past = filled_slots(named)
    real_BT = ~padding_of(named.get("attention_mask"), past, given.shape[:2], given.device)
    if isinstance(ids, Tensor):
        special = torch.tensor(sorted(set(special_ids(model))), dtype=ids.dtype, device=ids.device)
        real_BT = real_BT & ~torch.isin(ids, special)
    return real_BT


def special_ids(model: PreTrainedModel) -> Iterator[int]:
    """BOS, EOS and padding, as the model's configuration tells."""
    for config in (model.config, model.config.get_text_config()):
        for name in SPECIAL:
            found = getattr(config, name, None)
            yield from found if isinstance(found, list | tuple) else () if found is None else (found,)
