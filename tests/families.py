"""A small configuration of every model family that has hooks."""

from collections.abc import Callable

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from shared.lm.hookpoint import SITES

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**SHAPE, "num_key_value_heads": 1}
HEADS = {**GQA, "head_dim": 8}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GQA),
    "mistral": lambda: MistralConfig(**GQA, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**GQA),
    "qwen3": lambda: Qwen3Config(**HEADS),
    "gemma2": lambda: Gemma2Config(**HEADS, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, query_pre_attn_scalar=8, sliding_window=4),
    "pythia": lambda: GPTNeoXConfig(**SHAPE, use_parallel_residual=True),
    "neox_serial": lambda: GPTNeoXConfig(**SHAPE, use_parallel_residual=False),
}
# Families that have every hook too, without a tensor-parallel plan or without a difference in structure to the above.
MORE_FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**HEADS),
    "gpt2": lambda: GPT2Config(**{**SHAPE, "n_inner": 24}),
    "phi": lambda: PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**GQA),
    "starcoder2": lambda: Starcoder2Config(**GQA),
}
PARALLEL = ("pythia", "phi")


def sites_of(family: str) -> list[str]:
    """The hook sites that the family has."""
    return [site for site in SITES if site != "resid_mid" or family not in PARALLEL]
