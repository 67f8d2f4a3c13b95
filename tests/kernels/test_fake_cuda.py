"""What the interpreter cannot show, on fake CUDA tensors: which types products take there, and what they return."""

import importlib.util

import pytest
import torch

from shared.kernels import Compute, product
from shared.kernels.auxk import ALONE, DeadRows, blocks
from shared.kernels.fake_cuda import DEVICE, FakeCuda

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, device=DEVICE, dtype=dtype)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tiles_are_float32_whatever_the_inputs_are(dtype, compute_dtype, monkeypatch):
    from shared.kernels.encode_topk import triton as encode

    monkeypatch.setattr(encode, "TILE_ROWS", 3)
    monkeypatch.setattr(encode, "SMALLEST_TILE", 128)
    monkeypatch.setattr(encode, "WORKSPACE_MB", 0)
    with FakeCuda():
        x, W = zeros(7, 8, dtype=dtype), zeros(300, 8, dtype=dtype)
        parts = [(rows, columns, z.shape, z.dtype) for rows, columns, z in encode.tiles(x, W, compute_dtype)]
    assert [(rows.start, columns.start) for rows, columns, _, _ in parts] == [
        (row, column) for column in (0, 128, 256) for row in (0, 3, 6)
    ]
    for rows, columns, shape, tile_dtype in parts:
        assert shape == (rows.stop - rows.start, columns.stop - columns.start)
        assert tile_dtype == torch.float32


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_auxk_keeps_float32_sums(compute_dtype, monkeypatch):
    seen = []
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *args, **kwargs: seen.append(kwargs.get("out_dtype")) or mm(*args, **kwargs)
    )
    with FakeCuda():
        rows = DeadRows.alone(zeros(5, 4).requires_grad_(), zeros(5).requires_grad_(), zeros(5, 4).requires_grad_())
        error = blocks.auxk_error(zeros(6, 4), zeros(6, 4), rows, 3, ALONE, 0.3, compute_dtype)
        grads = torch.autograd.grad(error, (rows.W_enc_RD, rows.b_enc_R, rows.W_dec_RD))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    assert seen.count(torch.float32) == (5 if compute_dtype == "bfloat16" else 0)


def test_product_in_bfloat16_is_float32():
    with FakeCuda():
        a, b = zeros(3, 4).requires_grad_(), zeros(4, 5).requires_grad_()
        result = product(a, b, compute=Compute(dtype="bfloat16"))
        grads = torch.autograd.grad(result.sum(), (a, b))
    assert [tensor.dtype for tensor in (result, *grads)] == [torch.float32] * 3
