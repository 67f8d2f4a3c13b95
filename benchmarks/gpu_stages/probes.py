"""Stage ``probes``: four choices that counts alone decided, each against another, with the prediction beside it."""

import torch
from step_providers import make_batch

from gpu_stages.context import Context
from shared.kernels import Compute, PairGradient, PairOrder, decode, encode_topk, tuning


def run(context: Context) -> None:
    """Each is told as (shipped ms, other ms, what their ratio was predicted to be)."""
    shape = context.shape("a")
    x = make_batch(shape, context.device)
    generator = torch.Generator(device=context.device).manual_seed(0)
    W = torch.randn(shape.d_latent, shape.d_model, device=context.device, generator=generator)
    W.div_(W.norm(dim=1, keepdim=True))
    b = torch.zeros(shape.d_latent, device=context.device)
    compute, options = Compute(context.kernels, "bfloat16"), {"kernels": context.kernels}

    def encode(**choice: int) -> float:
        with tuning.trial({tuning.key("encode_topk", shape.d_model): choice}):
            return context.milliseconds(lambda: encode_topk(x, W, b, shape.k, compute=compute))

    values, indices = encode_topk(x, W, b, shape.k, compute=compute)
    order, rows, gradient = PairOrder(indices, shape.d_latent), x.bfloat16(), PairGradient()

    def norm(**choice: int) -> float:
        def call() -> None:
            gradient.clear()
            gradient.add(values, indices, order, rows)
            gradient.squared_norm(W, **options)

        with tuning.trial({tuning.key("pair_norm", shape.d_model): choice}):
            return context.milliseconds(call)

    def tell(name: str, shipped: float, other: float, predicted: str) -> None:
        context.say(f"probe {name}", shipped_ms=shipped, other_ms=other, ratio=other / shipped, predicted=predicted)

    shipped = norm()
    tell("pair_norm, 4 warps and 8 pairs", shipped, norm(num_warps=4, BLOCK_P=8), "1.5 to 2.5: barriers in the loop")
    tell("pair_norm, 1,024 columns", shipped, norm(BLOCK_D=1024), "0.9 to 1.1")
    shipped = encode()
    tell("encode_topk, 512 columns a turn", shipped, encode(BLOCK=512), "1.0 to 1.15: half the rows at once")
    tell("encode_topk, workspace 64 MB", shipped, encode(WORKSPACE_MB=64), "1.0 to 1.1 on an H100: beyond its L2")
    tell("encode_topk, workspace 128 MB", shipped, encode(WORKSPACE_MB=128), "1.05 to 1.2")
    rounded = W.bfloat16()
    half = context.milliseconds(lambda: decode(values, indices, rounded, **options))
    whole = context.milliseconds(lambda: decode(values, indices, W, **options))
    rounding = context.milliseconds(lambda: W.bfloat16())
    tell("decode, W_dec in float32", half, whole, "1.9 to 2.0")
    context.say("probe rounding W_dec", ms=rounding, predicted="6 F d bytes at the copy's rate")
