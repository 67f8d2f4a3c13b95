"""Stage ``machine``: what is here, and the rates that all figures are held against."""

import sys

import torch

from gpu_stages.context import Context


def run(context: Context) -> None:
    """Versions, the bfloat16 product's rate, memory's, and whether float32 results of bfloat16 products are exact."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "none"
    name = "rehearsal" if context.rehearse else torch.cuda.get_device_name()
    context.say("versions", device=name, **versions)
    check_product(context, 64 if context.rehearse else 8192)
    count = 1 << 10 if context.rehearse else 1 << 30
    source, target = (torch.zeros(count, device=context.device) for _ in range(2))
    seconds = context.milliseconds(lambda: target.copy_(source)) * 1e-3
    context.say("copy", tb_per_s=2 * 4 * count / seconds / 1e12)


def check_product(context: Context, size: int) -> None:
    """The form that the encoder uses: bfloat16 operands, float32 results, into a given tensor."""
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, device=context.device)

    def product() -> None:
        if context.rehearse:
            torch.mm(a.float(), b.float().T, out=out)
        else:
            torch.mm(a, b.T, out_dtype=torch.float32, out=out)

    flops = 2 * size**3 / (context.milliseconds(product) * 1e-3)
    truth = a[:64].double() @ b.double().T
    error = float((out[:64].double() - truth).norm() / truth.norm())
    context.check("float32 results of a bfloat16 product", error, 1e-5)
    context.say("product", tflops=flops / 1e12)
