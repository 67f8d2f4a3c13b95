"""Every operation, forward, against its dense reference: awkward shapes, padding, duplicates, ties, poisoned outputs.

Inputs are small integers, so that every product and sum is exact in every type: the selection must agree with the
reference index for index, ties included, and the values bit for bit wherever the result is an integer.
"""

import importlib.util

import pytest
import torch

from shared.kernels import (
    AdamStep,
    Compute,
    PairOrder,
    decode,
    dot_picks,
    encode_topk,
    latent_sum,
    row_grad,
    row_update,
)
from shared.kernels.encode_topk import bounds
from shared.kernels.row_update import torch_ as update_torch
from tests.spanning import spanning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# N, D, F, k: odd, not powers of two, k = 1, k = F, one row, one dimension.
SHAPES = [(3, 13, 101, 7), (1, 64, 33, 1), (2, 100, 90, 32), (2, 1, 9, 9)]
CASES = [("torch", shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float64)]
CASES += [("triton", shape, torch.float32) for shape in SHAPES]
CASES += [("triton", (2, 21, 70, 5), dtype) for dtype in (torch.bfloat16, torch.float16)]


# The interpreter is slow: of what would be tried with each of its cases, each has one in the default tests.
CHEAP = [number for number, (kernels, _, _) in enumerate(CASES) if kernels == "torch"]


def in_every_type(test):
    """Parametrise over implementation, shape and type."""
    ids = [f"{kernels}-{shape}-{str(dtype)[6:]}" for kernels, shape, dtype in CASES]
    return pytest.mark.parametrize(("kernels", "shape", "dtype"), CASES, ids=ids, indirect=["kernels"])(test)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def integers(rng, *shape, low=-3, high=4):
    return torch.randint(low, high, shape, generator=rng).to(DEVICE, torch.float64)


def random_picks(rng, n, num_latents, k):
    """Values and indices with duplicates and with padding, one row all padding; padding has a value to be ignored."""
    indices = torch.randint(-1, num_latents, (n, k), generator=rng).to(DEVICE)
    indices[0] = -1
    return integers(rng, n, k), indices


def assert_same(actual, expected):
    assert torch.equal(actual.double(), expected.double())


# A bias of -20: fewer than k positives in most rows.
@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "bias"), spanning(CASES, [0.0, -20.0], CHEAP), ids=str, indirect=["kernels"]
)
def test_encode_topk(rng, kernels, shape, dtype, bias):
    n, d, num_latents, k = shape
    x, W = integers(rng, n, d), integers(rng, num_latents, d)
    b = torch.full((num_latents,), bias, dtype=torch.float64, device=DEVICE)
    expected_values, expected_indices = encode_topk(x, W, b, k, compute=Compute("reference"))
    values, indices = encode_topk(x.to(dtype), W.to(dtype), b.to(dtype), k, compute=Compute(kernels))
    assert_same(values, expected_values)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(indices >= 0, values > 0)


def test_encode_topk_in_row_tiles_equals_one_tile(rng, monkeypatch):
    x, W, b = integers(rng, 23, 8), integers(rng, 50, 8), torch.zeros(50, dtype=torch.float64, device=DEVICE)
    whole = encode_topk(x, W, b, 6, compute=Compute("torch"))
    monkeypatch.setattr(bounds, "TILE_ELEMENTS", 4 * 50 + 7)  # 4 rows at a time, 3 in the last
    monkeypatch.setattr(bounds, "LARGE_TILE_ELEMENTS", 6 * 50)
    for largest, rows in ((W.numel(), 4), (W.numel() - 1, 6)):
        monkeypatch.setattr(bounds, "LARGE_WEIGHT", largest)
        assert len(bounds.row_tiles(x, W)[0]) == rows
        tiled = encode_topk(x, W, b, 6, compute=Compute("torch"))
        assert torch.equal(tiled[0], whole[0])
        assert torch.equal(tiled[1], whole[1])


@pytest.mark.parametrize("num_latents", [640, 650])  # 650 is no multiple of the group size
def test_encode_topk_by_groups_with_many_ties(rng, num_latents):
    x, W = integers(rng, 9, 3), integers(rng, num_latents, 3)
    b = torch.zeros(num_latents, dtype=torch.float64, device=DEVICE)
    expected_values, expected_indices = encode_topk(x, W, b, 11, compute=Compute("reference"))
    values, indices = encode_topk(x, W, b, 11, compute=Compute("torch"))
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


def test_encode_topk_in_bfloat16_keeps_exact_values(rng, kernels):
    x, W = torch.randn(4, 48, generator=rng).to(DEVICE), torch.randn(90, 48, generator=rng).to(DEVICE)
    b = torch.randn(90, generator=rng).to(DEVICE)
    expected_values, expected_indices = encode_topk(x, W, b, 8, compute=Compute("reference"))
    values, indices = encode_topk(x, W, b, 8, compute=Compute(kernels, "bfloat16"))
    if kernels == "torch":  # nominates in bfloat16, decides in float32
        torch.testing.assert_close(values, expected_values)
        assert torch.equal(indices, expected_indices)
    else:
        torch.testing.assert_close(values, expected_values, rtol=2e-2, atol=5e-2)


def test_encode_topk_refuses_an_unknown_compute_dtype():
    with pytest.raises(ValueError, match="compute_dtype='float8'"):
        encode_topk(torch.ones(2, 3), torch.ones(8, 3), torch.zeros(8), 2, compute=Compute(dtype="float8"))


def one_row(column, k, kernels):
    """encode_topk where the pre-activations are exactly `column`, for two equal rows."""
    W = torch.tensor(column, device=DEVICE)[:, None]
    b = torch.zeros(len(column), device=DEVICE)
    values, indices = encode_topk(torch.ones(2, 1, device=DEVICE), W, b, k, compute=Compute(kernels))
    assert torch.equal(values, values[:1].expand(2, k))
    assert torch.equal(indices, indices[:1].expand(2, k))
    return values[0].tolist(), indices[0].tolist()


def test_encode_topk_ties_go_to_the_lowest_index(kernels):
    column = [1.0, 5.0, 2.0, 2.0, 2.0, 2.0, -1.0, 5.0, 0.0]
    for implementation in ("reference", kernels):
        assert one_row(column, 4, implementation) == ([5.0, 5.0, 2.0, 2.0], [1, 7, 2, 3])
    # A constant row across several tiles and blocks.
    assert one_row([1.5] * 150, 3, kernels) == ([1.5] * 3, [0, 1, 2])


def test_encode_topk_zeroed_slots_are_padding(kernels):
    for implementation in ("reference", kernels):
        assert one_row([-1.0, 3.0, 0.0, -2.0], 3, implementation) == ([3.0, 0.0, 0.0], [1, -1, -1])


def test_encode_topk_of_an_ascending_row_keeps_the_last(kernels):
    # The worst case for a bar that rises: every value passes it.
    values, indices = one_row([float(value) for value in range(150)], 5, kernels)
    assert values == [149.0, 148.0, 147.0, 146.0, 145.0]
    assert indices == [149, 148, 147, 146, 145]


def test_encode_topk_does_not_hide_nan(kernels):
    x = torch.full((1, 4), float("nan"), device=DEVICE)
    for implementation in ("reference", kernels):
        W, b = torch.ones(80, 4, device=DEVICE), torch.zeros(80, device=DEVICE)
        assert bool(encode_topk(x, W, b, 2, compute=Compute(implementation))[0].isnan().any())


def test_encode_topk_of_no_rows(kernels):
    W = torch.ones(8, 3, device=DEVICE)
    values, indices = encode_topk(W[:0], W, torch.zeros(8, device=DEVICE), 2, compute=Compute(kernels))
    assert values.shape == indices.shape == (0, 2)


def test_encode_topk_refuses_a_k_out_of_range():
    with pytest.raises(ValueError, match="k=9"):
        encode_topk(torch.ones(2, 3), torch.ones(8, 3), torch.zeros(8), 9)


@in_every_type
def test_decode(rng, kernels, shape, dtype):
    n, d, num_latents, k = shape
    values, indices = random_picks(rng, n, num_latents, k)
    W = integers(rng, num_latents, d)
    expected = decode(values, indices, W, kernels="reference")
    assert_same(decode(values.to(dtype), indices, W.to(dtype), kernels=kernels), expected)
    assert not expected[0].any()


@in_every_type
def test_dot_picks(rng, kernels, shape, dtype):
    n, d, num_latents, k = shape
    _, indices = random_picks(rng, n, num_latents, k)
    W, grad = integers(rng, num_latents, d), integers(rng, n, d)
    expected = dot_picks(grad, indices, W, kernels="reference")
    assert_same(dot_picks(grad.to(dtype), indices, W.to(dtype), kernels=kernels), expected)
    assert not expected[indices < 0].any()


@in_every_type
def test_row_grad_and_latent_sum(rng, kernels, shape, dtype):
    n, d, num_latents, k = shape
    values, indices = random_picks(rng, n, num_latents, k)
    if n > 1:
        indices[1:] = indices[1:].clamp_max(3)  # four latents with long lists, the others with none
    rows = integers(rng, n, d)
    order = PairOrder(indices, num_latents)
    for op, args in ((row_grad, (values, indices, rows)), (latent_sum, (values, indices))):
        expected = op(*args, num_latents, order, kernels="reference")
        cast = [argument if argument is indices else argument.to(dtype) for argument in args]
        assert_same(op(*cast, num_latents, order, kernels=kernels), expected)


# Tiles are of the torch form: 40 elements, several tiles, the last one ragged.
@pytest.mark.parametrize(
    ("kernels", "tile_elements"), [("torch", 1 << 20), ("torch", 40), ("triton", 1 << 20)], indirect=["kernels"]
)
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(("num_rows", "d"), [(31, 7), (1, 1500), (3, 64)])
def test_row_update(rng, monkeypatch, kernels, unit_rows, num_rows, d, tile_elements):
    monkeypatch.setattr(update_torch, "TILE_ELEMENTS", tile_elements)
    start = torch.randn(5, num_rows, d, generator=rng, dtype=torch.float64).to(DEVICE)
    if unit_rows:
        start[0] /= start[0].norm(dim=1, keepdim=True)
    results = {}
    for implementation in ("reference", kernels):
        dtype = torch.float32 if implementation == "triton" else torch.float64
        weight, first, second = (tensor.to(dtype, copy=True) for tensor in (start[0], start[1], start[2].square()))
        for step in (3, 4):
            clip = torch.tensor(0.25, dtype=dtype, device=DEVICE)
            adam = AdamStep(0.1, (0.8, 0.95), 1e-3, step, clip, unit_rows)
            row_update(weight, start[step].to(dtype, copy=True), first, second, adam, kernels=implementation)
        results[implementation] = [tensor.double() for tensor in (weight, first, second)]
        if unit_rows:
            assert float((weight.norm(dim=1) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(results[kernels], results["reference"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("num_rows", [16, 21])  # whole chunks of 8 pairs, and pairs on both sides of them
def test_latents_that_fire_on_every_row(kernels, rng, num_rows):
    indices = torch.tensor([[2, 5], [5, 2], [5, 0]], device=DEVICE).repeat(num_rows // 3 + 1, 1)[:num_rows]
    values, rows = integers(rng, num_rows, 2), integers(rng, num_rows, 9)
    expected = row_grad(values, indices, rows, 7, PairOrder(indices, 7), kernels="reference")
    result = row_grad(values.float(), indices, rows.float(), 7, PairOrder(indices, 7), kernels=kernels)
    assert_same(result, expected)
    expected = latent_sum(values, indices, 7, PairOrder(indices, 7), kernels="reference")
    assert_same(latent_sum(values.float(), indices, 7, PairOrder(indices, 7), kernels=kernels), expected)


def test_no_picks_at_all(kernels, rng):
    indices = torch.full((4, 3), -1, device=DEVICE)
    values, rows, W = (integers(rng, *shape).float() for shape in ((4, 3), (4, 5), (7, 5)))
    order = PairOrder(indices, 7)
    for result in (
        decode(values, indices, W, kernels=kernels),
        dot_picks(rows, indices, W, kernels=kernels),
        row_grad(values, indices, rows, 7, order, kernels=kernels),
        latent_sum(values, indices, 7, order, kernels=kernels),
    ):
        assert torch.equal(result, torch.zeros_like(result))


def test_same_bits_on_a_second_run(rng, kernels):
    x, W = torch.randn(3, 48, generator=rng).to(DEVICE), torch.randn(60, 48, generator=rng).to(DEVICE)
    b = torch.zeros(60, device=DEVICE)
    runs = []
    for _ in range(2):
        values, indices = encode_topk(x, W, b, 5, compute=Compute(kernels))
        order = PairOrder(indices, 60)
        runs.append(
            (
                values,
                indices,
                decode(values, indices, W, kernels=kernels),
                dot_picks(x, indices, W, kernels=kernels),
                row_grad(values, indices, x, 60, order, kernels=kernels),
                latent_sum(values, indices, 60, order, kernels=kernels),
            )
        )
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_unknown_switch_is_refused():
    with pytest.raises(ValueError, match="kernels='cuda'"):
        decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 2), kernels="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine the tensors would be on it")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="kernels=triton needs CUDA"):
        decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 2), kernels="triton")


def test_auto_is_torch_on_a_cpu():
    assert importlib.util.find_spec("shared.kernels.decode.triton") is not None
    values = torch.ones(1, 1, dtype=torch.float64)  # triton would answer in float32
    assert decode(values, torch.zeros(1, 1, dtype=torch.int64), values).dtype == torch.float64
