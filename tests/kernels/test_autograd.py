"""Every gradient of the composed sparse step, by name, against autograd through the dense formula."""

import pytest
import torch

from shared.kernels import (
    Compute,
    PairGradient,
    PairOrder,
    attach_encoder,
    encode_topk,
    sparse_decode,
    sparse_reconstruction,
)
from tests.spanning import spanning

NAMES = ("x", "b_pre", "W_enc", "b_enc", "W_dec")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_problem(n, d, num_latents, bias, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype).to(DEVICE)

    tensors = {
        "x": random(n, d),
        "b_pre": random(d),
        "W_enc": random(num_latents, d),
        "b_enc": random(num_latents) + bias,
        "W_dec": random(num_latents, d),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, random(n, d)


def relative_error(actual, expected):
    """Root mean square error over root mean square; 0 where both are 0."""
    scale = expected.norm()
    return float((actual - expected).detach().norm() / scale.detach()) if scale > 0 else float(actual.detach().norm())


def dense_step(p, k):
    z = torch.relu((p["x"] - p["b_pre"]) @ p["W_enc"].T + p["b_enc"])
    values, indices = z.topk(k)
    return torch.zeros_like(z).scatter(1, indices, values) @ p["W_dec"]


def sparse_step(p, k, kernels):
    centred = p["x"] - p["b_pre"].detach()
    with torch.no_grad():
        values, indices = encode_topk(centred, p["W_enc"], p["b_enc"], k, compute=Compute(kernels))
    order = PairOrder(indices, p["W_enc"].shape[0])
    values = attach_encoder(
        centred, p["b_pre"], p["W_enc"], p["b_enc"], values, indices, order, compute=Compute(kernels)
    )
    return sparse_decode(values, indices, p["W_dec"], order, compute=Compute(kernels))


SHAPES = [(37, 13, 101, 7), (3, 100, 33, 33), (65, 64, 500, 1)]
CASES = [(kernels, shape) for kernels in ("reference", "torch") for shape in SHAPES]
CASES += [("triton", (3, 13, 50, 7)), ("triton", (2, 70, 17, 17))]


CHEAP = [number for number, (kernels, _) in enumerate(CASES) if kernels != "triton"]  # the interpreter is slow


# A bias of -6: fewer than k positives in most rows.
@pytest.mark.parametrize(("kernels", "shape", "bias"), spanning(CASES, [0.0, -6.0], CHEAP), indirect=["kernels"])
def test_every_gradient(kernels, shape, bias):
    n, d, num_latents, k = shape
    p, cotangent = make_problem(n, d, num_latents, bias, torch.float32 if kernels == "triton" else torch.float64)
    expected_out = dense_step(p, k)
    expected = torch.autograd.grad((expected_out * cotangent).sum(), [p[name] for name in NAMES])
    out = sparse_step(p, k, kernels)
    grads = torch.autograd.grad((out * cotangent).sum(), [p[name] for name in NAMES])
    assert relative_error(out, expected_out) < (1e-6 if kernels == "triton" else 1e-12)
    for name, grad, truth in zip(NAMES, grads, expected, strict=True):
        assert relative_error(grad, truth) < (1e-6 if kernels == "triton" else 1e-12), f"gradient of {name}"


@pytest.mark.parametrize(("kernels", "shape", "sink"), spanning(CASES, [False, True], CHEAP), indirect=["kernels"])
def test_the_loss_in_one_with_every_gradient(kernels, shape, sink):
    n, d, num_latents, k = shape
    dtype = torch.float32 if kernels == "triton" else torch.float64
    p, target = make_problem(n, d, num_latents, 0.0, dtype)
    rng = torch.Generator().manual_seed(2)
    values, indices = (
        torch.randn(n, k, generator=rng, dtype=dtype),
        torch.randint(-1, num_latents, (n, k), generator=rng),
    )
    values, indices = values.to(DEVICE).requires_grad_(), indices.to(DEVICE)
    weight, metric = (torch.rand(d, generator=rng, dtype=dtype).to(DEVICE) for _ in range(2))
    dense = torch.zeros(n, num_latents, dtype=dtype, device=DEVICE)
    dense = dense.scatter_add(1, indices.clamp_min(0), values.masked_fill(indices < 0, 0))
    b = p["x"].detach()[0].clone().requires_grad_()
    left = target - dense @ p["W_dec"] - b
    truth = (left.square() @ weight).mean()
    given = [values, p["W_dec"], b]
    expected = torch.autograd.grad(3 * truth, given)
    gradient = PairGradient() if sink else None
    options = {"compute": Compute(kernels), "sink": gradient}
    order = PairOrder(indices, num_latents)
    loss, other, result = sparse_reconstruction(
        values, indices, p["W_dec"], b, target, weight, metric, order, **options
    )
    grads = torch.autograd.grad(3 * loss, given, allow_unused=sink)
    tolerance = 2e-6 if kernels == "triton" else 1e-12
    assert [tensor.requires_grad for tensor in (loss, other, result)] == [True, False, False]
    assert relative_error(loss, truth) < tolerance
    assert relative_error(other, (left.square() @ metric).mean()) < tolerance
    assert relative_error(result, left) < tolerance
    for name, grad, wanted in zip(("values", "W_dec", "b"), grads, expected, strict=True):
        if sink and name == "W_dec":
            assert grad is None
            grad = gradient.dense(p["W_dec"], kernels)
        assert relative_error(grad, wanted) < tolerance, f"gradient of {name}"


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_gradcheck(kernels):
    p, _ = make_problem(5, 4, 11, 0.0)
    assert torch.autograd.gradcheck(
        lambda *tensors: sparse_step(dict(zip(NAMES, tensors, strict=True)), 3, kernels),
        [p[name] for name in NAMES],
        fast_mode=False,
    )


def test_no_gradient_through_relu_zeroed_picks():
    # Only latent 1 is positive; a k of 3 picks two more that ReLU zeroes. They must not learn.
    W_enc = torch.tensor([[-1.0], [2.0], [-3.0], [-4.0]], requires_grad=True)
    b_enc = torch.zeros(4, requires_grad=True)
    W_dec = torch.ones(4, 1, requires_grad=True)
    x = torch.ones(5, 1)
    values, indices = encode_topk(x, W_enc.detach(), b_enc.detach(), 3, compute=Compute("torch"))
    order = PairOrder(indices, 4)
    values = attach_encoder(x, None, W_enc, b_enc, values, indices, order, compute=Compute("torch"))
    sparse_decode(values, indices, W_dec, order, compute=Compute("torch")).sum().backward()
    assert b_enc.grad.tolist() == [0.0, 5.0, 0.0, 0.0]
    assert W_enc.grad.tolist() == [[0.0], [5.0], [0.0], [0.0]]
    assert W_dec.grad.tolist() == [[0.0], [10.0], [0.0], [0.0]]


def test_gradients_that_nobody_asked_for_are_not_computed():
    p, cotangent = make_problem(9, 6, 30, 0.0)
    for name in ("x", "b_pre", "W_dec"):
        p[name].requires_grad_(False)
    (sparse_step(p, 4, "torch") * cotangent).sum().backward()
    assert p["x"].grad is None
    assert p["W_enc"].grad is not None
