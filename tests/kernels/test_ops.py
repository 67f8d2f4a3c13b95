"""Every operation, forward, against its dense reference in float64, at awkward shapes."""

import pytest
import torch

from shared.kernels import PairOrder, decode, dot_picks, encode_topk, latent_sum, row_grad, row_update
from shared.kernels.encode_topk import cpu as encode_cpu
from shared.kernels.row_update import cpu as update_cpu

# N, D, F, k: odd, not powers of two, k = 1, k = F, one row, one dimension.
SHAPES = [(37, 13, 101, 7), (1, 64, 33, 1), (63, 100, 257, 32), (5, 1, 9, 9), (16, 96, 640, 512)]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_picks(rng: torch.Generator, n: int, num_latents: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices with duplicates and with padding, one row all padding."""
    indices = torch.randint(-1, num_latents, (n, k), generator=rng)
    indices[0] = -1
    values = torch.randn(n, k, generator=rng, dtype=torch.float64)
    return values, indices  # values at padding are not zero: they must be ignored all the same


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_encode_topk(rng, shape, bias):
    n, d, num_latents, k = shape
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    W = torch.randn(num_latents, d, generator=rng, dtype=torch.float64)
    b = torch.full((num_latents,), bias, dtype=torch.float64)
    expected_values, expected_indices = encode_topk(x, W, b, k, kernels="reference")
    values, indices = encode_topk(x, W, b, k, kernels="torch")
    torch.testing.assert_close(values, expected_values)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(indices >= 0, values > 0)


def test_encode_topk_in_tiles_equals_one_tile(rng, monkeypatch):
    x, W = torch.randn(23, 8, generator=rng), torch.randn(50, 8, generator=rng)
    b = torch.zeros(50)
    whole = encode_topk(x, W, b, 6, kernels="torch")
    monkeypatch.setattr(encode_cpu, "TILE_ELEMENTS", 4 * 50 + 7)  # 4 rows at a time, 3 in the last
    tiled = encode_topk(x, W, b, 6, kernels="torch")
    torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_encode_topk_ties_go_to_the_lowest_index(kernels):
    # Pre-activations come from a one-hot input, so they are exactly the column of W.
    column = torch.tensor([1.0, 5.0, 2.0, 2.0, 2.0, 2.0, -1.0, 5.0, 0.0])
    values, indices = encode_topk(torch.ones(3, 1), column[:, None], torch.zeros(9), 4, kernels=kernels)
    assert values.tolist() == [[5.0, 5.0, 2.0, 2.0]] * 3
    assert indices.tolist() == [[1, 7, 2, 3]] * 3


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_encode_topk_zeroed_slots_are_padding(kernels):
    column = torch.tensor([-1.0, 3.0, 0.0, -2.0])
    values, indices = encode_topk(torch.ones(2, 1), column[:, None], torch.zeros(4), 3, kernels=kernels)
    assert values.tolist() == [[3.0, 0.0, 0.0]] * 2
    assert indices.tolist() == [[1, -1, -1]] * 2


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_encode_topk_does_not_hide_nan(kernels):
    values, _ = encode_topk(torch.full((1, 4), float("nan")), torch.ones(8, 4), torch.zeros(8), 2, kernels=kernels)
    assert bool(values.isnan().any())


def test_encode_topk_refuses_a_k_out_of_range():
    with pytest.raises(ValueError, match="k=9"):
        encode_topk(torch.ones(2, 3), torch.ones(8, 3), torch.zeros(8), 9)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode(rng, shape):
    n, d, num_latents, k = shape
    values, indices = random_picks(rng, n, num_latents, k)
    W = torch.randn(num_latents, d, generator=rng, dtype=torch.float64)
    expected = decode(values, indices, W, kernels="reference")
    torch.testing.assert_close(decode(values, indices, W, kernels="torch"), expected)
    assert not expected[0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_dot_picks(rng, shape):
    n, d, num_latents, k = shape
    _, indices = random_picks(rng, n, num_latents, k)
    W = torch.randn(num_latents, d, generator=rng, dtype=torch.float64)
    grad = torch.randn(n, d, generator=rng, dtype=torch.float64)
    expected = dot_picks(grad, indices, W, kernels="reference")
    torch.testing.assert_close(dot_picks(grad, indices, W, kernels="torch"), expected)
    assert not expected[indices < 0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_row_grad_and_latent_sum(rng, shape):
    n, d, num_latents, k = shape
    values, indices = random_picks(rng, n, num_latents, k)
    rows = torch.randn(n, d, generator=rng, dtype=torch.float64)
    order = PairOrder(indices, num_latents)
    for op, args in ((row_grad, (values, indices, rows)), (latent_sum, (values, indices))):
        expected = op(*args, num_latents, order, kernels="reference")
        torch.testing.assert_close(op(*args, num_latents, order, kernels="torch"), expected)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("tile_elements", [1 << 20, 40])
def test_row_update(rng, monkeypatch, unit_rows, tile_elements):
    monkeypatch.setattr(update_cpu, "TILE_ELEMENTS", tile_elements)  # 40: several tiles, the last one ragged
    start = torch.randn(3, 31, 7, generator=rng, dtype=torch.float64)
    if unit_rows:
        start[0] /= start[0].norm(dim=1, keepdim=True)
    results = {}
    for kernels in ("reference", "torch"):
        weight, first, second = start[0].clone(), start[1].clone(), start[2].square()
        for step in (3, 4):
            grad = start[step - 2] + step
            clip = torch.tensor(0.25, dtype=torch.float64)
            options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "step": step, "unit_rows": unit_rows}
            row_update(weight, grad, first, second, clip=clip, **options, kernels=kernels)
        results[kernels] = (weight, first, second)
    torch.testing.assert_close(results["torch"], results["reference"])


def test_no_picks_at_all(rng):
    indices = torch.full((4, 3), -1)
    values, rows, W = torch.ones(4, 3), torch.randn(4, 5, generator=rng), torch.randn(7, 5, generator=rng)
    order = PairOrder(indices, 7)
    assert not decode(values, indices, W, kernels="torch").any()
    assert not dot_picks(rows, indices, W, kernels="torch").any()
    assert not row_grad(values, indices, rows, 7, order, kernels="torch").any()
    assert not latent_sum(values, indices, 7, order, kernels="torch").any()


def test_same_bits_on_a_second_run(rng):
    x, W = torch.randn(257, 48, generator=rng), torch.randn(999, 48, generator=rng)
    b = torch.zeros(999)
    runs = []
    for _ in range(2):
        values, indices = encode_topk(x, W, b, 17, kernels="torch")
        order = PairOrder(indices, 999)
        runs.append(
            (
                values,
                indices,
                decode(values, indices, W, kernels="torch"),
                dot_picks(x, indices, W, kernels="torch"),
                row_grad(values, indices, x, 999, order, kernels="torch"),
                latent_sum(values, indices, 999, order, kernels="torch"),
            )
        )
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_unknown_switch_is_refused():
    with pytest.raises(ValueError, match="kernels='cuda'"):
        decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 2), kernels="cuda")
