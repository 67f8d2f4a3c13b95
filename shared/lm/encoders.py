"""Encoders of text: BERT and its kin, and the encoder's half of an encoder-decoder such as T5 or BART."""

import inspect
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from shared.lm.identity import read_config
from shared.lm.load import load_part

# Lengths that a tokenizer gives where it knows of none are beyond any model's.
NO_LENGTH = 1 << 24


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model sees a text whole, each token those behind it too."""
    if getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or (
        bool(getattr(config, "is_encoder_decoder", False))
        and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )


def load_encoder(
    path: str, dtype: str, *, device: torch.device, revision: str | None, attn_implementation: str
) -> PreTrainedModel:
    """The whole encoder without a head, in evaluation mode, weights without gradient; raises as ``load_trunk``."""
    config = read_config(path, revision)
    made: Any = AutoModel._model_mapping[type(config)]
    # A pooler belongs to a head, and the files of a masked language model have none.
    extra = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made.__init__).parameters else {}
    model = load_part(AutoModel, path, config, dtype, revision, attn_implementation, None, extra)
    encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
    torch.nn.Module.to(encoder, device)
    return encoder


def most_positions(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The longest text that an encoder takes, in tokens; None where nothing limits it.

    RoBERTa's kin count positions from behind the padding token's id, so they have that many fewer.
    """
    found = [getattr(config, "max_position_embeddings", None)]
    if tokenizer is not None and tokenizer.model_max_length < NO_LENGTH:
        found.append(tokenizer.model_max_length)
    positions = min((one for one in found if isinstance(one, int) and one > 0), default=None)
    counted_from_padding = config.model_type in ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "esm")
    if positions is not None and positions == found[0] and counted_from_padding:
        return positions - (config.pad_token_id or 0) - 1
    return positions


def ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text, such as [CLS] and [SEP]."""
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return list(whole[:start]), list(whole[start + len(bare) :])
