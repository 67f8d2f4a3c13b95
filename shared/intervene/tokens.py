"""Which positions of a language model's forward hold tokens that dictionaries are trained on.

Legend: B rows, T positions of the forward.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.intervene.padding import padding_of

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def real_tokens(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """bool [B, T]: neither padding nor special (BOS, EOS, padding of the model's configuration).

    None where the forward is not one of a transformers model over tokens.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    takes_ids = model.main_input_name == "input_ids"
    ids = kwargs.get("input_ids", args[0] if args and takes_ids else None)
    given = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    real_BT = ~padding_of(kwargs.get("attention_mask"), past, given.shape[:2], given.device)
    if isinstance(ids, Tensor):
        special = torch.tensor(sorted(set(_special_ids(model))), dtype=ids.dtype, device=ids.device)
        real_BT = real_BT & ~torch.isin(ids, special)
    return real_BT


def _special_ids(model: PreTrainedModel) -> Iterator[int]:
    for config in (model.config, model.config.get_text_config()):
        for name in SPECIAL:
            found = getattr(config, name, None)
            yield from found if isinstance(found, list | tuple) else () if found is None else (found,)
