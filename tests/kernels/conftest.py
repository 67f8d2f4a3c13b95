"""Kernels under test: the torch forms, and the triton ones in triton's interpreter (on a GPU machine, compiled)."""

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def let_the_interpreter_index() -> None:
    """With numpy >= 2.4 an array of one element is no longer an index; triton 3.6's interpreter relies on it."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, *args, **kwargs):
        result = patch_tensor(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patched


def let_the_interpreter_multiply_bfloat16() -> None:
    """Triton 3.6's interpreter keeps bfloat16 as 16-bit integers, and its product takes them for numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched(self, a, b, d, *options):
        return multiply(self, wide(a), wide(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = patched


if HAS_TRITON and DEVICE == "cpu":
    let_the_interpreter_index()
    let_the_interpreter_multiply_bfloat16()


def poisoned_empty(*args, **kwargs):
    """torch.empty filled with what no kernel may leave behind."""
    tensor = torch.full((), 0, dtype=kwargs.get("dtype") or torch.get_default_dtype())
    poison = float("nan") if tensor.is_floating_point() else -(2**31) + 7
    shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
    return torch.full(tuple(shape), poison, **kwargs)


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """Each implementation in turn; triton's outputs are poisoned first, and in the interpreter its blocks are small."""
    if request.param == "triton":
        if not HAS_TRITON:
            pytest.skip("triton is not installed")
        from shared.kernels.encode_threshold import triton as threshold
        from shared.kernels.encode_topk import triton as encode
        from shared.kernels.row_grad import triton as grad

        monkeypatch.setattr(torch, "empty", poisoned_empty)
        if DEVICE == "cpu":
            monkeypatch.setattr(encode, "BLOCK_COLUMNS", 32)
            monkeypatch.setattr(threshold, "BLOCK_COLUMNS", 32)
            monkeypatch.setattr(encode, "SMALLEST_TILE", 48)
            monkeypatch.setattr(encode, "WORKSPACE_MB", 0)
            monkeypatch.setattr(encode, "TILE_ROWS", 2)
            monkeypatch.setattr(threshold, "PAIRS_PER_ROW", 4)
            monkeypatch.setattr(threshold, "_pairs_per_row", {})
            monkeypatch.setattr(grad, "SUM_BLOCK_P", 8)
            monkeypatch.setattr(grad, "CHUNK", 8)
    return request.param
