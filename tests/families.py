"""A small configuration of every model family that has hooks."""

from collections.abc import Callable

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

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
