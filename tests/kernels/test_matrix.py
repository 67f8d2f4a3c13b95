"""Every operation x provider x awkward size, against the dense reference in float64.

Sizes: model widths, powers of two and not; one pick and thousands; odd N and F. Inputs are -1, 0 and 1 with duplicates,
padding, ties and an all-zero row among them, so sums are exact in float32 and, at width 64, in the half types.
"""

import functools

import pytest
import torch

from shared.kernels import (
    AdamStep,
    Compute,
    DeadRows,
    PairGradient,
    PairOrder,
    auxk_error,
    decode,
    dot_picks,
    encode_batchtopk,
    encode_threshold,
    encode_topk,
    latent_sum,
    row_grad,
    row_update,
)
from tests.spanning import spanning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (64, 100, 768, 3584, 4096, 5120)
KS = (1, 512, 2048)
PROVIDERS = ("torch", "triton")
UPDATE = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "step": 3}


def problem(n, d, num_latents, k, dtype):
    rng = torch.Generator().manual_seed(n * d + k)

    def ternary(*shape):
        return torch.randint(-1, 2, shape, generator=rng).to(DEVICE, dtype)

    x = ternary(n, d)
    x[0] = 0  # an all-zero row: fewer than k positives
    indices = torch.randint(-1, num_latents, (n, k), generator=rng).to(DEVICE)  # duplicates and padding
    W = ternary(num_latents, d)
    W[:, 0] = 1
    return {"x": x, "W": W, "b": ternary(num_latents), "values": ternary(n, k), "indices": indices, "g": ternary(n, d)}


def weights(p, d):
    wide = p["W"].double() + torch.arange(1, d + 1, device=DEVICE) / d
    unit = (wide / wide.norm(dim=1, keepdim=True)).to(torch.promote_types(p["W"].dtype, torch.float32))
    return unit, unit / 8, unit.square() / 8


def run_update(p, k, kernels, unit_rows):
    weight, first, second = weights(p, p["W"].shape[1])
    grad, clip = p["W"].to(weight.dtype), torch.tensor(0.5, dtype=weight.dtype, device=DEVICE)
    adam = AdamStep(clip=clip, unit_rows=unit_rows, **UPDATE)
    row_update(weight, grad, first, second, adam, kernels=kernels)
    return weight, first, second


def run_pairs(p, k, kernels, unit_rows):
    weight, first, second = weights(p, p["W"].shape[1])
    gradient = PairGradient()
    gradient.add(p["values"], p["indices"], PairOrder(p["indices"], len(weight)), p["g"])
    gradient.add_rows(torch.tensor([2, 0], device=DEVICE), p["W"][:2].to(weight.dtype))
    square = gradient.squared_norm(weight, kernels=kernels)
    clip = 10 / square.to(weight.dtype).sqrt()
    adam = AdamStep(clip=clip, unit_rows=unit_rows, **UPDATE)
    gradient.update(weight, first, second, adam, kernels=kernels)
    assert not gradient
    return square, weight, first, second


def run_auxk(p, k, kernels, slope=0.0):
    dead = [p["W"][:9].clone().requires_grad_(), p["b"][:9].clone().requires_grad_(), p["W"][3:12].clone()]
    dead[2].requires_grad_()
    error = auxk_error(p["g"], p["x"], DeadRows.alone(*dead), 4, slope=slope, compute=Compute(kernels))
    return error.detach(), *torch.autograd.grad(error, dead)


OPS = {
    "encode_topk": lambda p, k, kernels: encode_topk(p["x"], p["W"], p["b"], k, compute=Compute(kernels)),
    "encode_threshold": lambda p, k, kernels: encode_threshold(p["x"], p["W"], p["b"], 2.0, compute=Compute(kernels)),
    "encode_batchtopk": lambda p, k, kernels: encode_batchtopk(p["x"], p["W"], p["b"], k, compute=Compute(kernels)),
    "decode": lambda p, k, kernels: [decode(p["values"], p["indices"], p["W"], kernels=kernels)],
    "dot_picks": lambda p, k, kernels: [dot_picks(p["g"], p["indices"], p["W"], kernels=kernels)],
    "row_grad": lambda p, k, kernels: [
        row_grad(p["values"], p["indices"], p["x"], len(p["W"]), PairOrder(p["indices"], len(p["W"])), kernels=kernels)
    ],
    "latent_sum": lambda p, k, kernels: [
        latent_sum(p["values"], p["indices"], len(p["W"]), PairOrder(p["indices"], len(p["W"])), kernels=kernels)
    ],
    "row_update": functools.partial(run_update, unit_rows=False),
    "row_update_unit_rows": functools.partial(run_update, unit_rows=True),
    "pair_update": functools.partial(run_pairs, unit_rows=False),
    "pair_update_unit_rows": functools.partial(run_pairs, unit_rows=True),
    "auxk": run_auxk,
    "auxk_leaky": functools.partial(run_auxk, slope=0.25),
}


def check(op, kernels, n, d, num_latents, k, dtype=torch.float32):
    expected = OPS[op](problem(n, d, num_latents, k, torch.float64), k, "reference")
    actual = OPS[op](problem(n, d, num_latents, k, dtype), k, kernels)
    again = OPS[op](problem(n, d, num_latents, k, dtype), k, kernels)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for number, (result, truth, repeat) in enumerate(zip(actual, expected, again, strict=True)):
        assert torch.equal(result, repeat), f"{op} output {number}: other bits on a second run"
        assert result.shape == truth.shape
        if not truth.is_floating_point():
            assert torch.equal(result, truth), f"{op} output {number}"
        error = float((result.double() - truth.double()).norm()) / max(float(truth.double().norm()), 1e-30)
        assert error <= (0.0 if op.startswith("encode") else tolerance), f"{op} output {number}: {error}"


def sizes(all_sizes, quick_in_triton):
    """Parameters (kernels, size): the interpreter is slow, so it takes some sizes in `make test-all` only."""
    return [
        pytest.param(kernels, size, marks=() if kernels == "torch" or size in quick_in_triton else pytest.mark.slow)
        for kernels in PROVIDERS
        for size in all_sizes
    ]


@pytest.mark.parametrize(("kernels", "d"), sizes(WIDTHS, (100,)), indirect=["kernels"])
@pytest.mark.parametrize("op", OPS)
def test_width(op, kernels, d):
    check(op, kernels, n=3, d=d, num_latents=33 if op.startswith("encode") else 13, k=5)


@pytest.mark.parametrize(("kernels", "k"), sizes(KS, (1,)), indirect=["kernels"])
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("row_update", "auxk"))])  # those see no k
def test_k(op, kernels, k):
    check(op, kernels, n=2, d=5, num_latents=k + 3 if op.startswith("encode") else 13, k=k)


HALVED = [(kernels, op) for kernels in PROVIDERS for op in OPS if not op.startswith("row_update")]  # those are float32


@pytest.mark.parametrize(
    ("kernels", "op", "dtype"),
    spanning(
        HALVED, [torch.bfloat16, torch.float16], [n for n, (kernels, _) in enumerate(HALVED) if kernels == "torch"]
    ),
    ids=str,
    indirect=["kernels"],
)
def test_half_types(op, kernels, dtype):
    check(op, kernels, n=3, d=64, num_latents=33, k=5, dtype=dtype)


def half_step(step, grad, moments=0.0):
    """Moments after one step of Adam from equal ones, in bfloat16 and in float32; weights after it likewise."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.full_like(grad, 0.5)
        first, second = (torch.full_like(grad, moments, dtype=torch.bfloat16).to(dtype) for _ in range(2))
        adam = AdamStep(0.1, (0.9, 0.999), 1e-8, step, torch.ones((), device=DEVICE), unit_rows=False)
        row_update(weight, grad.clone(), first, second, adam, kernels="triton")
        results.append((weight, first, second))
    return results


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_bfloat16_moments_are_rounded_to_a_neighbour_and_right_on_average(kernels):
    grad = torch.linspace(0.1, 1, 4096, device=DEVICE).view(2, 2048)
    (weight, *half), (exact_weight, *exact) = half_step(3, grad)
    assert torch.equal(weight, exact_weight)  # the step itself is taken from the unrounded moments
    for rounded, truth in zip(half, exact, strict=True):
        assert rounded.dtype == torch.bfloat16
        error = (rounded.double() - truth.double()) / truth.double()
        assert 2**-9 < float(error.abs().max()) <= 2**-7  # to the nearest it would be at most 2^-9
        assert abs(float(error.mean())) < 5 * 2**-7 / len(truth.view(-1)) ** 0.5
    again, other = half_step(3, grad)[0], half_step(4, grad)[0]
    assert all(torch.equal(a, b) for a, b in zip(again[1:], half, strict=True))
    assert not torch.equal(other[1], half[0])
    assert not torch.equal(half[0].float() > exact[0], half[1].float() > exact[1])  # each has bits of its own


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_a_moment_that_is_not_finite_stays_so(kernels):
    grad = torch.ones(1, 64, device=DEVICE)
    grad[0, 3], grad[0, 4] = torch.inf, torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    (_, first, second), _ = half_step(1, grad)
    assert first[0, 3] == torch.inf
    assert bool(first[0, 4].isnan())
    assert bool(second[0, 4].isnan())
    assert int(first.isfinite().sum()) == 62


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_pair_update_with_bfloat16_moments_is_row_update_with_them(kernels, unit_rows):
    p = problem(3, 100, 13, 5, torch.float32)
    gradient, states = PairGradient(), []
    adam = AdamStep(clip=torch.tensor(0.5, device=DEVICE), unit_rows=unit_rows, **UPDATE)
    for by_pairs in (False, True):
        gradient.add(p["values"], p["indices"], PairOrder(p["indices"], 13), p["g"])
        weight, first, second = weights(p, 100)
        state = [weight, first.bfloat16(), second.bfloat16()]
        if by_pairs:
            gradient.update(*state, adam, kernels=kernels)
        else:
            row_update(weight, gradient.dense(weight, kernels).clone(), *state[1:], adam, kernels=kernels)
        gradient.clear()
        states.append(state)
    torch.testing.assert_close(states[0][0], states[1][0])
    for one, other in zip(states[0][1:], states[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
