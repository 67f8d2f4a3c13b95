"""``x W^T + b`` on a CPU by the fastest product there is."""

import torch
import torch.nn.functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# oneDNN adds up bfloat16 products in float32; of other libraries that is not known.
HAS_BFLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Whether the processor has an instruction for it; elsewhere such a product is no faster than float32's.
FAST_BFLOAT16 = HAS_BFLOAT16 and any(
    getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
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
