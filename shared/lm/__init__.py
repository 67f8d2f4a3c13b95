"""The language model, as far as harvesting and splicing need it: load it, name its activations, read and replace them.

This is the only package that knows how Hugging Face models are built inside.
"""

from shared.lm.hooks import capture, check_hooks, needed_depth
from shared.lm.identity import ModelIdentity, load_config, load_trunk_config, model_identity, resolve_model
from shared.lm.load import load_causal_lm, load_trunk
from shared.lm.packed import packed_inputs, segment_positions
from shared.lm.places import decoder_blocks
from shared.lm.quantised import quantisation_config
from shared.lm.splicing import splice, splice_through
from shared.lm.tensor_parallel import check_tensor_parallel
from shared.lm.tokenizer import SpecialIds, load_tokenizer, special_ids, tokenizer_hash

__all__ = [
    "ModelIdentity",
    "SpecialIds",
    "capture",
    "check_hooks",
    "check_tensor_parallel",
    "decoder_blocks",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "load_trunk",
    "load_trunk_config",
    "model_identity",
    "needed_depth",
    "packed_inputs",
    "quantisation_config",
    "resolve_model",
    "segment_positions",
    "special_ids",
    "splice",
    "splice_through",
    "tokenizer_hash",
]
