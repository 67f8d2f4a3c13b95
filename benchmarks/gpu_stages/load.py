"""Stage ``load``: the published load, half of an 8-billion LLaMA and a dictionary that learns from what it gives.

OpenSAE reports 7,716 tokens/s on an H100 for 262,144 latents on Llama-3.1-8B, k 128, the model's forward included. Here
too every token is made and learnt from at once; weights and tokens are random, which changes no time. By count: 7 GFLOP
per token of the forward at 500 TFLOP/s and the measured step give 49,000 tokens/s, 6.4 x.
"""

import torch
from transformers import LlamaConfig, LlamaModel

from gpu_stages.context import PUBLISHED, SHAPES, TINY, Context
from gpu_stages.trainee import make_trainee

SEQ_LEN = 4096


def run(context: Context) -> None:
    """Forward and step, alone and one after the other."""
    shape = TINY if context.rehearse else SHAPES["b"]
    seq_len = 3 if context.rehearse else SEQ_LEN
    model = make_model(context, shape.d_model)
    tokens = torch.randint(model.config.vocab_size, (shape.batch // seq_len, seq_len), device=context.device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        """The residual stream [N, d], one context at a time: longer batches need more memory and are no faster."""
        rows = [model(context_tokens[None], use_cache=False).last_hidden_state[0] for context_tokens in tokens]
        return torch.cat(rows).float()

    trainee = make_trainee(shape, context.device, kernels=context.kernels)
    x = forward()
    times = {
        "forward": context.steady(forward, 3),
        "step": context.steady(lambda: trainee.step(x), 3),
        "forward and step": context.steady(lambda: trainee.step(forward()), 3),
    }
    peak = 0 if context.rehearse else torch.cuda.max_memory_allocated()
    for name, ms in times.items():
        per_second = shape.batch / ms * 1e3
        context.say(
            f"load {name}", shape=str(shape), ms=ms, tokens_per_s=per_second, over_published=per_second / PUBLISHED
        )
    context.say("load memory", peak_gb=peak / 1e9)


def make_model(context: Context, d_model: int) -> LlamaModel:
    """Layers 0 to 15 of Llama-3.1-8B's shape in bfloat16, without the final norm."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, max_position_embeddings=SEQ_LEN)  # fmt: skip
    if context.rehearse:
        config = LlamaConfig(hidden_size=d_model, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=1, vocab_size=50)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(context.device):
            model = LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    return model
