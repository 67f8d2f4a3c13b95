"""``x W^T + b`` on a CPU by the fastest product there is."""

import os

import torch
import torch.nn.functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# What GRANARY_BFLOAT16 may say in place of the detection, to see on one processor what another one does.
CHOICES = ("auto", "none", "slow", "fast")


def bfloat16_products(choice: str, has_product: bool, has_instruction: bool) -> tuple[bool, bool]:
    """Whether there is a bfloat16 product that adds up in float32, and whether it is faster than float32's.

    ``auto`` goes by what oneDNN has and what the processor has an instruction for; ``none``, ``slow`` and ``fast`` are
    processors without the product, with the product alone, and with both. Raises ValueError for another choice, and
    for ``slow`` and ``fast`` where there is no such product.
    """
    if choice not in CHOICES:
        raise ValueError(f"GRANARY_BFLOAT16={choice}: choose from {', '.join(CHOICES)}")
    if choice in ("slow", "fast") and not has_product:
        raise ValueError(f"GRANARY_BFLOAT16={choice}: this processor has no bfloat16 product; choose auto or none")
    if choice == "auto":
        return has_product, has_product and has_instruction
    return choice != "none", choice == "fast"


# oneDNN adds up bfloat16 products in float32; of other libraries that is not known. Without an instruction for it
# such a product is no faster than float32's.
HAS_BFLOAT16, FAST_BFLOAT16 = bfloat16_products(
    os.environ.get("GRANARY_BFLOAT16", "auto"),
    has_product=_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    has_instruction=any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ),
)


def linear(x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``, [N, F], of one type; by oneDNN where it can, which is up to twice as fast as MKL's product."""
    is_float = x_ND.dtype == torch.float32 or (x_ND.dtype == torch.bfloat16 and HAS_BFLOAT16)
    if _ONEDNN and is_float and x_ND.numel() and W_FD.numel() and not x_ND.is_cuda:
        z_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x_ND.contiguous(), W_FD.contiguous(), b_F, "none", [], ""
        )
        return z_NF
    return F.linear(x_ND, W_FD, b_F)
