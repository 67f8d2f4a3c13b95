"""What tests of intervention splice into: a LLaMA of three layers, prompts for it, and its activations."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shared.lm import capture
from shared.lm.hookpoint import HookPoint

D, F, K, VOCAB, BOS = 16, 40, 5, 50, 1
HOOK = "layers.1.resid_post"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt(batch: int = 2, length: int = 7) -> Tensor:
    tokens = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    return tokens


def activation(model: LlamaForCausalLM, hook: str = HOOK, **inputs: Any) -> Tensor:
    with torch.no_grad(), capture(model, [HookPoint.parse(hook)]) as captured:
        model(**inputs)
    return captured[HookPoint.parse(hook)]
