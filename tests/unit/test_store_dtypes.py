"""bfloat16 for zarr-python, and int8 in blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zarr.dtype import parse_dtype

from shared.errors import GranaryError
from shared.store.dtypes import INT8_BLOCK, BFloat16Bits, bits_to_float, convert, float_to_bits, scales_per_row
from shared.store.quantise import dequantise, dequantise_f32, quantise


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
    x_TD = (np.random.default_rng(seed).standard_normal((rows, d_model)) * scale).astype(np.float32)
    q_TD = np.empty(x_TD.shape, np.int8)
    scale_TG = np.empty((rows, scales_per_row(d_model)), np.float16)
    quantise(x_TD, q_TD, scale_TG)
    assert q_TD.min() >= -127
    step_TD = np.repeat(scale_TG.astype(np.float32), INT8_BLOCK, axis=1)[:, :d_model]
    values = np.empty_like(x_TD)
    dequantise_f32(q_TD, scale_TG, values)
    assert (np.abs(values - x_TD) <= 0.5001 * step_TD).all()
    largest = np.abs(x_TD).max(axis=1)
    assert (np.abs(values).max(axis=1) >= largest * (1 - 1 / 254) - step_TD.max(axis=1) / 2).all()
    out_TD = torch.empty(x_TD.shape, dtype=torch.bfloat16)
    dequantise(torch.from_numpy(q_TD), torch.from_numpy(scale_TG), out_TD)
    assert torch.equal(out_TD, torch.from_numpy(values).to(torch.bfloat16))


def test_int8_of_a_huge_dimension_leaves_other_blocks_alone():
    x_TD = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    x_TD[:, 200] = 5000.0
    q_TD, scale_TG = np.empty(x_TD.shape, np.int8), np.empty((64, 4), np.float16)
    quantise(x_TD, q_TD, scale_TG)
    values = np.empty_like(x_TD)
    dequantise_f32(q_TD, scale_TG, values)
    error = ((values - x_TD) ** 2).sum(axis=0)
    other = np.r_[0:128, 256:512]
    assert error[other].sum() / (x_TD[:, other] ** 2).sum() < 2e-4


def test_int8_of_zeros_and_of_what_is_not_finite():
    x_TD = np.zeros((2, 130), np.float32)
    x_TD[0, 5], x_TD[0, 6], x_TD[0, 7] = np.nan, np.inf, 2.0
    q_TD, scale_TG = np.empty(x_TD.shape, np.int8), np.empty((2, 2), np.float16)
    quantise(x_TD, q_TD, scale_TG)
    values = np.empty_like(x_TD)
    dequantise_f32(q_TD, scale_TG, values)
    assert values[0, 7] == pytest.approx(2.0, rel=1e-2)
    assert np.count_nonzero(values) == 1


def test_int8_refuses_what_float16_scales_cannot_hold():
    x_TD = np.full((1, 4), 1e7, np.float32)
    with pytest.raises(GranaryError, match=r"use store\.dtype=bfloat16"):
        quantise(x_TD, np.empty((1, 4), np.int8), np.empty((1, 1), np.float16))
