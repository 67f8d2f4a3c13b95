"""``encode_threshold`` and ``encode_batchtopk`` against their dense references and against loops over single numbers.

Inputs are small integers, so that products are exact in every type and ties abound.
"""

import pytest
import torch

from shared.kernels import Compute, PairOrder, attach_encoder, decode, encode_batchtopk, encode_threshold, smallest_kept
from shared.kernels.encode_topk import bounds
from tests.spanning import spanning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [(3, 13, 101, 7), (1, 64, 33, 1), (5, 100, 90, 32), (2, 1, 9, 9)]  # N, D, F, k
CASES = [("torch", shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float64)]
CASES += [("triton", shape, torch.float32) for shape in SHAPES]
HALVES = (torch.bfloat16, torch.float16)
CASES += [(kernels, (2, 21, 70, 5), dtype) for kernels in ("torch", "triton") for dtype in HALVES]
# The interpreter is slow: of what would be tried with each of its cases, each has one in the default tests.
CHEAP = [number for number, (kernels, _, _) in enumerate(CASES) if kernels == "torch"]


def in_every_type(name, values):
    """Parametrise over implementation, shape, type and `values` of the argument `name`."""
    names = ("kernels", "shape", "dtype", name)
    return pytest.mark.parametrize(names, spanning(CASES, values, CHEAP), ids=str, indirect=["kernels"])


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def integers(rng, *shape, low=-2, high=3):
    return torch.randint(low, high, shape, generator=rng).to(DEVICE, torch.float64)


def as_set(values, indices):
    """{(row, latent, value)} of a padded result, whose form is checked on the way."""
    assert torch.equal(values == 0, (indices < 0) | (values == 0))
    for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True):
        count = sum(index >= 0 for index in row_indices)
        assert row_indices[count:] == [-1] * (len(row_indices) - count)
        assert row_values[count:] == [0.0] * (len(row_indices) - count)
        keys = [(-value, index) for value, index in zip(row_values[:count], row_indices[:count], strict=True)]
        assert keys == sorted(keys)
    rows, slots = (indices >= 0).nonzero(as_tuple=True)
    return set(zip(rows.tolist(), indices[rows, slots].tolist(), values[rows, slots].double().tolist(), strict=True))


def by_loop_above(z, threshold):
    return {
        (row, latent, float(z[row, latent]))
        for row in range(z.shape[0])
        for latent in range(z.shape[1])
        if z[row, latent] > threshold[latent]
    }


def by_loop_batch(z, num):
    entries = [(-float(z[r, f]), r, f) for r in range(z.shape[0]) for f in range(z.shape[1]) if z[r, f] > 0]
    return {(row, latent, -minus) for minus, row, latent in sorted(entries)[:num]}


@in_every_type("threshold", [0.0, 2.5, -3.0, "per latent", 1e4])
def test_encode_threshold(rng, kernels, shape, dtype, threshold):
    n, d, num_latents, _ = shape
    x, W, b = integers(rng, n, d), integers(rng, num_latents, d), integers(rng, num_latents)
    if threshold == "per latent":
        threshold = integers(rng, num_latents)
    bar = torch.as_tensor(threshold, dtype=torch.float64, device=DEVICE).expand(num_latents)
    expected = by_loop_above(x @ W.T + b, bar)
    for implementation, to in (("reference", torch.float64), (kernels, dtype)):
        values, indices = encode_threshold(x.to(to), W.to(to), b.to(to), threshold, compute=Compute(implementation))
        assert as_set(values, indices) == expected
        assert values.shape[1] == max(1, int((indices >= 0).sum(1).max()))


@in_every_type("bias", [0.0, -20.0])  # -20: fewer than N * k positives in most cases
def test_encode_batchtopk(rng, kernels, shape, dtype, bias):
    n, d, num_latents, k = shape
    x, W = integers(rng, n, d), integers(rng, num_latents, d)
    b = torch.full((num_latents,), bias, dtype=torch.float64, device=DEVICE)
    expected = by_loop_batch(x @ W.T + b, n * k)
    for implementation, to in (("reference", torch.float64), (kernels, dtype)):
        values, indices = encode_batchtopk(x.to(to), W.to(to), b.to(to), k, compute=Compute(implementation))
        assert as_set(values, indices) == expected
        smallest = min((value for _, _, value in expected), default=float("inf"))
        assert float(smallest_kept(values, indices)) == smallest


def test_row_tiles_do_not_change_the_result(rng, monkeypatch, kernels):
    rows = 23 if kernels == "torch" else 7  # the interpreter is slow
    x, W, b = integers(rng, rows, 8), integers(rng, 50, 8), integers(rng, 50)
    for op, argument in ((encode_threshold, 3.0), (encode_batchtopk, 4)):
        expected = op(x, W, b, argument, compute=Compute("reference"))
        monkeypatch.setattr(bounds, "TILE_ELEMENTS", 4 * 50 + 7)  # 4 rows at a time, 3 in the last
        values, indices = op(x.float(), W.float(), b.float(), argument, compute=Compute(kernels))
        assert torch.equal(values.double(), expected[0])
        assert torch.equal(indices, expected[1])


def test_encode_batchtopk_ties_go_to_the_lower_row_then_the_lower_latent(kernels):
    # Latents 40 and 90 lie in later tiles of columns than 3: the lower row must win all the same.
    x = torch.eye(3, device=DEVICE)
    W = torch.full((100, 3), -1.0, device=DEVICE)
    W[[40, 90], 0] = 2.0
    W[3, 1] = W[3, 2] = 2.0
    W[7, 1] = 5.0
    for implementation in ("reference", kernels):
        values, indices = encode_batchtopk(x, W, torch.zeros(100, device=DEVICE), 1, compute=Compute(implementation))
        assert as_set(values, indices) == {(1, 7, 5.0), (0, 40, 2.0), (0, 90, 2.0)}


def test_a_batch_where_nothing_fires(kernels):
    x, W, b = torch.ones(4, 3, device=DEVICE), -torch.ones(40, 3, device=DEVICE), torch.zeros(40, device=DEVICE)
    for implementation in ("reference", kernels):
        for op, argument in ((encode_threshold, 0.0), (encode_batchtopk, 2)):
            values, indices = op(x, W, b, argument, compute=Compute(implementation))
            assert values.tolist() == [[0.0]] * 4
            assert indices.tolist() == [[-1]] * 4
            assert not decode(values, indices, W, kernels=implementation).any()


def test_no_rows(kernels):
    W, b = torch.ones(40, 3, device=DEVICE), torch.zeros(40, device=DEVICE)
    for implementation in ("reference", kernels):
        for op, argument in ((encode_threshold, 0.0), (encode_batchtopk, 2)):
            values, indices = op(W[:0], W, b, argument, compute=Compute(implementation))
            assert values.shape == indices.shape == (0, 1)


def test_nan_is_not_hidden(kernels):
    x = torch.full((2, 4), float("nan"), device=DEVICE)
    W, b = torch.ones(40, 4, device=DEVICE), torch.zeros(40, device=DEVICE)
    for implementation in ("reference", kernels):
        for op, argument in ((encode_threshold, 0.0), (encode_batchtopk, 2)):
            assert bool(op(x, W, b, argument, compute=Compute(implementation))[0].isnan().any())


@pytest.mark.parametrize(("op", "argument"), [(encode_threshold, 9.0), (encode_batchtopk, 6)])
def test_bfloat16_nominates_and_float32_decides(rng, op, argument, monkeypatch):
    x, W = torch.randn(50, 48, generator=rng), torch.randn(400, 48, generator=rng)
    b = torch.randn(400, generator=rng)
    monkeypatch.setattr(bounds, "TILE_ELEMENTS", 7 * 400)
    expected_values, expected_indices = op(x, W, b, argument, compute=Compute("reference"))
    values, indices = op(x, W, b, argument, compute=Compute("torch", "bfloat16"))
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected_values)
    assert not torch.equal(x.bfloat16().float(), x)


@pytest.mark.parametrize(("op", "argument"), [(encode_threshold, 9.0), (encode_batchtopk, 6)])
def test_bfloat16_on_a_gpu_rounds_the_operands(rng, op, argument, kernels):
    x, W = torch.randn(3, 48, generator=rng), torch.randn(90, 48, generator=rng)
    b = torch.randn(90, generator=rng)
    if kernels == "triton":
        rounded = op(x.bfloat16().float(), W.bfloat16().float(), b, argument, compute=Compute("reference"))
        x, W, b = (tensor.to(DEVICE) for tensor in (x, W, b))
        values, indices = op(x, W, b, argument, compute=Compute(kernels, "bfloat16"))
        assert torch.equal(indices.cpu(), rounded[1])
        torch.testing.assert_close(values.cpu(), rounded[0])


@pytest.mark.parametrize(("op", "argument"), [(encode_threshold, 4.0), (encode_batchtopk, 6)])
def test_gradients_from_the_pairs(rng, op, argument):
    x, W, b = (tensor.requires_grad_() for tensor in (integers(rng, 9, 5), integers(rng, 30, 5), integers(rng, 30)))
    with torch.no_grad():
        values, indices = op(x, W, b, argument, compute=Compute("torch"))
    z = x @ W.T + b
    kept = torch.zeros_like(z).scatter_add(1, indices.clamp_min(0), (indices >= 0).double())
    weights = torch.randn(z.shape, generator=rng, dtype=torch.float64).to(DEVICE)
    expected = torch.autograd.grad((z * kept * weights).sum(), (x, W, b))
    z_NM = attach_encoder(x, None, W, b, values, indices, PairOrder(indices, 30), compute=Compute("torch"))
    picked_weights = weights.gather(1, indices.clamp_min(0)) * (indices >= 0)
    for grad, truth in zip(torch.autograd.grad((z_NM * picked_weights).sum(), (x, W, b)), expected, strict=True):
        torch.testing.assert_close(grad, truth)


def test_same_bits_on_a_second_run(rng, kernels):
    x, W, b = (torch.randn(*shape, generator=rng).to(DEVICE) for shape in ((3, 48), (60, 48), (60,)))
    for op, argument in ((encode_threshold, 3.0), (encode_batchtopk, 4)):
        first, second = (op(x, W, b, argument, compute=Compute(kernels)) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_wrong_arguments_are_refused():
    x, W, b = torch.ones(2, 3), torch.ones(8, 3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"threshold has shape \(7,\)"):
        encode_threshold(x, W, b, torch.zeros(7))
    with pytest.raises(ValueError, match="k=9"):
        encode_batchtopk(x, W, b, 9)
    for op, argument in ((encode_threshold, 0.0), (encode_batchtopk, 2)):
        with pytest.raises(ValueError, match="compute_dtype='fp8'"):
            op(x, W, b, argument, compute=Compute(dtype="fp8"))
