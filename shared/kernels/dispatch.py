"""Which implementation runs: the one switch of this package."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

KERNELS = ("auto", "triton", "torch", "reference")
_FILES = {"triton": "triton", "torch": "torch_", "reference": "reference"}
# Multiply and add are one instruction, as measured. Triton 3.9 warns where nobody has said so, and 3.10 will not fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def resolve(kernels: str, tensor: torch.Tensor) -> str:
    """``auto`` to the implementation for `tensor`'s device; the other names to themselves.

    auto: triton on CUDA where triton is installed, else torch. Raises ValueError for an unknown name and for triton on
    a device it cannot run on.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: choose from {', '.join(KERNELS)}")
    if kernels == "auto":
        return "triton" if tensor.is_cuda and importlib.util.find_spec("triton") is not None else "torch"
    if kernels == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernels=triton needs CUDA tensors (or TRITON_INTERPRET=1 to run slowly on a CPU)")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("kernels=triton: triton is not installed: pip install triton, or choose kernels=torch")
    return kernels


def implementation(op: str, kernels: str, tensor: torch.Tensor) -> ModuleType:
    """The module of ``shared.kernels.<op>`` that runs; triton is imported only where it is used."""
    return importlib.import_module(f"shared.kernels.{op}.{_FILES[resolve(kernels, tensor)]}")
