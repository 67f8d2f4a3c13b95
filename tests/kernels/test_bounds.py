"""Bounds by a bfloat16 product: they hold, and what they leave to float32 is picked bit for bit as from all latents."""

import pytest
import torch

from shared.kernels import Compute, encode_batchtopk, encode_threshold, encode_topk, linear
from shared.kernels.encode_topk import bounds, torch_

pytestmark = pytest.mark.skipif(not linear.HAS_BFLOAT16, reason="oneDNN has no bfloat16 product on this processor")

N, D, LATENTS = 40, 60, 1501


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def changed(tensor, at, value):
    tensor[at] = value
    return tensor


def problems():
    """{name: (x, W, b, rows that bounds may leave undecided)}"""
    x, W, b, zero = random(N, D), random(LATENTS, D), random(LATENTS), torch.zeros(LATENTS)
    integers = torch.randint(-3, 4, (N + LATENTS, D), generator=torch.Generator().manual_seed(0)).float()
    return {
        "random": (x, W, b, 0),
        "one massive dimension": (changed(x.clone(), (slice(None), 3), 1e3), W, b, 0),
        "one massive row": (x * changed(torch.ones(N, 1), 7, 1e3), W, b, 1),
        "one huge latent": (x, W * changed(torch.ones(LATENTS, 1), 5, 1e4), b, 0),
        "one huge bias": (x, W, changed(b.clone(), 9, 1e4), 0),
        "ties of every value": (x, torch.cat([W[:750], W[:751]]), zero, 0),
        "ties within rows": (integers[:N], integers[N:], zero, N),
        "nearly equal latents": (x, random(1, D) + 1e-4 * W, zero, N),
        "fewer than k positives": (x, W, zero - 20, 0),
        "no positives": (x, W, zero - 200, 0),
        "rows of zeros": (changed(x.clone(), slice(0, N, 7), 0.0), W, zero, 6),
        "tiny": (1e-20 * x, 1e-15 * W, zero, N),
        "near overflow": (1e19 * x, 1e18 * W, zero, N),
    }


PROBLEMS = problems()


def float32_dots(x, W, b):
    """[N, F]: what ``exact_values`` computes for every pair."""
    rows, latents = torch.arange(len(x)).repeat_interleave(len(W)), torch.arange(len(W)).repeat(len(x))
    return bounds.exact_values(x, W, b, rows, latents).view(len(x), len(W))


@pytest.fixture
def fast(monkeypatch):
    """As on a processor with the instruction and for large weights, in several tiles."""
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)
    monkeypatch.setattr(bounds, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(bounds, "TILE_ELEMENTS", 16 * LATENTS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_bounds_hold(name):
    x, W, b, _ = PROBLEMS[name]
    made = bounds.Bounds(x, W, b)
    z = float32_dots(x, W, b).double()
    exact = x.double() @ W.double().T + b.double()
    for rows in made.tiles():
        upper = made.of(rows).double()
        for truth in (z[rows], exact[rows]):
            assert bool(((truth <= upper + bounds.ROUNDING * upper.abs()) | upper.isnan()).all())
        size = x[rows].double().norm(dim=1, keepdim=True) * W.double().norm(dim=1) + b.double().abs()
        assert bool((((upper - exact[rows]) <= 0.05 * size + 1e-15) | ~upper.isfinite()).all()), "a bound of no use"


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_picks_are_those_of_float32_bit_for_bit(fast, name, k):
    x, W, b, num_undecided = PROBLEMS[name]
    expected, order = float32_dots(x, W, b).sort(dim=1, descending=True, stable=True)
    values, indices, undecided = torch_._pick_by_bounds(x, W, b, k)
    assert len(undecided) <= num_undecided
    decided = torch.ones(N, dtype=torch.bool).index_fill(0, undecided, False)
    positive = (expected[:, :k] > 0) & decided[:, None]
    assert torch.equal(values.relu()[decided], expected[decided, :k].relu())
    assert torch.equal(indices[positive], order[:, :k][positive])


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_row_equals_the_reference(fast, name):
    x, W, b, _ = PROBLEMS[name]
    values, indices = encode_topk(x, W, b, 7)
    truth, _ = encode_topk(x.double(), W.double(), b.double(), 7, compute=Compute("reference"))
    size = x.norm(dim=1, keepdim=True).double() * W.norm(dim=1).max() + b.abs().max()
    assert bool(((values - truth).abs() <= 1e-5 * size).all())
    assert torch.equal(indices >= 0, values > 0)
    z = float32_dots(x, W, b).double().gather(1, indices.clamp_min(0))
    assert bool((((values - z).abs() <= 1e-5 * size) | (indices < 0)).all())


def test_rows_that_bounds_cannot_decide_are_done_in_float32(fast, monkeypatch):
    x, W, b, _ = PROBLEMS["rows of zeros"]
    redone = []
    by_product = torch_._pick_by_product
    monkeypatch.setattr(torch_, "_pick_by_product", lambda x, *rest: redone.append(len(x)) or by_product(x, *rest))
    assert bool((encode_topk(x, W, b, 3)[1][::7] == -1).all())
    assert redone == [6]


def test_hopeless_inputs_give_up_after_one_tile(fast, monkeypatch):
    x, W, b, _ = PROBLEMS["nearly equal latents"]
    tiles = []
    of = bounds.Bounds.of
    monkeypatch.setattr(bounds.Bounds, "of", lambda self, rows: tiles.append(rows) or of(self, rows))
    encode_topk(x, W, b, 3)
    assert len(tiles) == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W", "b"])
def test_what_is_not_finite_is_not_hidden(fast, poison, where):
    tensors = {"x": random(N, D), "W": random(LATENTS, D), "b": random(LATENTS)}
    tensors[where].view(-1)[7] = poison
    plain = encode_topk(**{n + ("_ND" if n == "x" else "_FD" if n == "W" else "_F"): t for n, t in tensors.items()},
                        k=5, compute=Compute("reference"))  # fmt: skip
    values, _ = encode_topk(*tensors.values(), 5)
    assert torch.equal(values.isnan(), plain[0].isnan())
    assert torch.equal(values.isinf(), plain[0].isinf())


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("threshold", [0.0, 4.0, -1.0, float("inf")])
def test_threshold_form_keeps_what_float32_keeps(fast, name, threshold):
    x, W, b, _ = PROBLEMS[name]
    threshold = threshold * float(x.norm(dim=1).median() * W.norm(dim=1).median()) / D**0.5 if threshold else 0.0
    values, indices = encode_threshold(x, W, b, threshold)
    z = float32_dots(x, W, b)
    kept = torch.zeros(N, LATENTS + 1, dtype=torch.bool).scatter_(1, indices % (LATENTS + 1), True)[:, :-1]
    near = (z - threshold).abs() <= 1e-5 * x.norm(dim=1, keepdim=True) * W.norm(dim=1)
    assert bool(((kept == (z > threshold)) | near).all())
    assert int((indices >= 0).sum()) == int(kept.sum())
    assert bool((values[:, 1:] <= values[:, :-1]).logical_or(indices[:, 1:] < 0).all())


@pytest.mark.parametrize("name", PROBLEMS)
def test_batch_form_keeps_the_largest(fast, name):
    x, W, b, _ = PROBLEMS[name]
    values, indices = encode_batchtopk(x, W, b, 4)
    truth, _ = encode_batchtopk(x.double(), W.double(), b.double(), 4, compute=Compute("reference"))
    size = float(x.norm(dim=1).max() * W.norm(dim=1).max() + b.abs().max())
    ours, theirs = (v.double().flatten().sort(descending=True).values[: 4 * N] for v in (values, truth))
    length = min(len(ours), len(theirs))
    assert float((ours[:length] - theirs[:length]).abs().max()) <= 1e-5 * size
    assert int((indices >= 0).sum()) <= 4 * N


def test_the_float32_product_is_used_where_nothing_is_gained(monkeypatch):
    def refuse(*_):
        raise AssertionError("bounds were made")

    monkeypatch.setattr(bounds, "Bounds", refuse)
    monkeypatch.setattr(torch_, "Bounds", refuse)
    x, W, b, _ = PROBLEMS["random"]
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)
    encode_topk(x, W, b, 3)  # small weights
    monkeypatch.setattr(bounds, "SMALLEST_WEIGHT", 0)
    encode_topk(x.double(), W.double(), b.double(), 3)
    encode_topk(x, W, b, LATENTS // 4)
    monkeypatch.setattr(linear, "FAST_BFLOAT16", False)
    encode_topk(x, W, b, 3)
    encode_topk(x, W, b, 3, compute=Compute(dtype="bfloat16"))
