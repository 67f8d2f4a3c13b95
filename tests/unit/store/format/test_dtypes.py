"""bfloat16 for zarr-python, and int8 in blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zarr.dtype import parse_dtype

from shared.basics.errors import GranaryError
from shared.store.format.dtypes import INT8_BLOCK, BFloat16Bits, bits_to_float, convert, float_to_bits, scales_per_row
from shared.store.format.quantise import dequantise, quantise


def test_zarr_finds_bfloat16_by_name_and_never_by_inference():
    assert isinstance(parse_dtype("bfloat16", zarr_format=3), BFloat16Bits)
    assert not isinstance(parse_dtype(np.dtype("uint16"), zarr_format=3), BFloat16Bits)
    assert BFloat16Bits().to_json(3) == "bfloat16"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", 0.0, 1.5, "0x7fc0"])
def test_fill_values_survive_json(text):
    kind = BFloat16Bits()
    bits = kind.from_json_scalar(text, zarr_format=3)
    again = kind.from_json_scalar(kind.to_json_scalar(bits, zarr_format=3), zarr_format=3)
    assert bits == again


@given(st.floats(width=32))
def test_bits_are_those_of_torch(value):
    expected = torch.tensor(value, dtype=torch.float32).to(torch.bfloat16)
    bits = float_to_bits(value)
    assert bits == expected.view(torch.uint16).item()
    back = bits_to_float(bits)
    assert back == expected.item() or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize("shape", [(7, 33), (40, 4096), (2, 40_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_in_pieces_is_the_whole_conversion(dtype, shape):
    x = torch.randn(shape)
    out = torch.empty(shape, dtype=dtype)
    convert(x, out)
    assert torch.equal(out, x.to(dtype))
    back = torch.empty(shape)
    convert(out, back)
    assert torch.equal(back, out.float())


@given(
    rows=st.integers(1, 5),
    d_model=st.sampled_from([1, 3, 127, 128, 129, 256, 300]),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_int8_is_within_half_a_step_of_every_value(rows, d_model, scale, seed):
    x_ND = scale * torch.randn(rows, d_model, generator=torch.Generator().manual_seed(seed))
    q_ND = torch.empty(x_ND.shape, dtype=torch.int8)
    scale_NG = torch.empty(rows, scales_per_row(d_model), dtype=torch.float16)
    assert quantise(x_ND, q_ND, scale_NG)
    assert q_ND.min() >= -127
    step_ND = scale_NG.float().repeat_interleave(INT8_BLOCK, dim=1)[:, :d_model]
    values = torch.empty_like(x_ND)
    dequantise(q_ND, scale_NG, values)
    assert torch.equal(values, q_ND.float() * step_ND)
    assert ((values - x_ND).abs() <= 0.5001 * step_ND).all()
    out_ND = torch.empty(x_ND.shape, dtype=torch.bfloat16)
    dequantise(q_ND, scale_NG, out_ND)
    assert torch.equal(out_ND, values.to(torch.bfloat16))


def quantised(x_ND):
    """What int8 makes of float32 rows."""
    q_ND = torch.empty(x_ND.shape, dtype=torch.int8)
    scale_NG = torch.empty(len(x_ND), scales_per_row(x_ND.shape[1]), dtype=torch.float16)
    finite = quantise(x_ND, q_ND, scale_NG)
    values = torch.empty_like(x_ND)
    dequantise(q_ND, scale_NG, values)
    return values, finite


def test_int8_of_a_huge_dimension_leaves_other_blocks_alone():
    x_ND = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x_ND[:, 200] = 5000.0
    error = (quantised(x_ND)[0] - x_ND) ** 2
    other = torch.cat([torch.arange(0, 128), torch.arange(256, 512)])
    assert error[:, other].sum() / (x_ND[:, other] ** 2).sum() < 2e-4


def test_int8_of_zeros_and_of_what_is_not_finite():
    x_ND = torch.zeros(2, 130)
    assert quantised(x_ND)[1]
    x_ND[0, 5], x_ND[0, 6], x_ND[0, 7], x_ND[1, 129] = float("nan"), float("inf"), 2.0, -float("inf")
    values, finite = quantised(x_ND)
    assert not finite
    assert values[0, 7] == pytest.approx(2.0, rel=1e-2)
    assert values.count_nonzero() == 1


def test_int8_refuses_what_float16_scales_cannot_hold():
    with pytest.raises(GranaryError, match=r"use store\.dtype=bfloat16"):
        quantised(torch.full((1, 4), 1e7))
