"""``transform_decode``: value and every gradient against a loop over tokens, in every form; no matrix of a map."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.kernels import Compute, PairOrder, Ranks, transform_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, D, E, K, ranks: all ranks alike, a ladder, ranks above the widths, a transform that nobody picks, one token.
SHAPES = [(7, 9, 5, 2, (3, 3, 3)), (70, 33, 20, 3, (17, 8, 4, 4, 2, 1)), (5, 4, 3, 2, (6, 5)), (1, 1, 1, 1, (1, 2))]


def by_loop(values_NK, indices_NK, x_ND, V_RD, U_RE, ranks):
    """One product of vectors after another."""
    rows = []
    for values, indices, x in zip(values_NK, indices_NK.tolist(), x_ND, strict=True):
        y = U_RE.new_zeros(U_RE.shape[1])
        for value, latent in zip(values, indices, strict=True):
            if latent >= 0:
                span = slice(ranks.offsets[latent], ranks.offsets[latent + 1])
                y = y + value * (U_RE[span].T @ (V_RD[span] @ x))
        rows.append(y)
    return torch.stack(rows)


def picks(shape, dtype, seed=0):
    """Values, latents of which some are padding and the last is never picked, x, V and U."""
    n, d, e, k, ranks = shape
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, max(k, len(ranks) - 1), generator=rng).argsort(1)[:, :k]
    indices = torch.where(torch.rand(n, k, generator=rng) < 0.2, -1, chosen.clamp_max(len(ranks) - 1)).to(DEVICE)
    sizes = ((n, k), (n, d), (sum(ranks), d), (sum(ranks), e))
    values, x, V, U = (torch.randn(size, generator=rng, dtype=torch.float64).to(DEVICE, dtype) for size in sizes)
    return values.masked_fill(indices < 0, 0), indices, x, V, U, Ranks(ranks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_every_gradient_against_a_loop(kernels, shape):
    dtype = torch.float32 if kernels == "triton" else torch.float64
    values, indices, x, V, U, ranks = picks(shape, dtype)
    weight = torch.randn(len(x), U.shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def results(decode, *tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = decode(*leaves)
        gradients = torch.autograd.grad((y * weight.to(y)).sum(), leaves)
        return [y.detach(), gradients[0].masked_fill(indices < 0, 0), *gradients[1:]]

    def form(name):
        order = PairOrder(indices, len(ranks.each))
        return lambda v, V, U: transform_decode(v, indices, x.to(v), V, U, order, ranks, compute=Compute(name))

    exact = [tensor.double() for tensor in (values, V, U)]
    expected = results(lambda v, V, U: by_loop(v, indices, x.double(), V, U, ranks), *exact)
    for found in (results(form(kernels), values, V, U), results(form("reference"), *exact)):
        for one, other in zip(found, expected, strict=True):
            tolerance = 1e-12 if one.dtype == torch.float64 else 1e-5
            scale = float(other.abs().max()) + 1e-9
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_bfloat16_rounds_the_operands_alone(kernels):
    values, indices, x, V, U, ranks = picks(SHAPES[1], torch.float32)
    order = PairOrder(indices, len(ranks.each))
    found = transform_decode(values, indices, x, V, U, order, ranks, compute=Compute(kernels, "bfloat16"))
    assert found.dtype == torch.float32
    rounded = [tensor.bfloat16().double() for tensor in (x, V, U)]
    expected = by_loop(values.double(), indices, *rounded, ranks)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("kernels", ["torch"])
def test_nobody_fires(kernels):
    _, _, x, V, U, ranks = picks(SHAPES[0], torch.float64)
    values, indices = torch.zeros(len(x), 2, dtype=torch.float64), torch.full((len(x), 2), -1)
    leaves = [tensor.requires_grad_() for tensor in (values, V, U)]
    order = PairOrder(indices, len(ranks.each))
    y = transform_decode(values, indices, x, V, U, order, ranks, compute=Compute(kernels))
    assert not y.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), leaves))


class Largest(TorchDispatchMode):
    """The most elements that a storage made within the context has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                size = made.untyped_storage().nbytes() // made.element_size()
                self.elements = max(self.elements, size)
        return result


def test_no_map_is_written_out():
    """The largest tensor of a step has as many elements as activations or factors have, not D x E."""
    values, indices, x, V, U, ranks = picks((20, 400, 300, 2, (8, 4, 4)), torch.float32)
    with Largest() as seen:
        y = transform_decode(values, indices, x, V.requires_grad_(), U.requires_grad_(), PairOrder(indices, 3), ranks)
        y.square().sum().backward()
    assert seen.elements <= max(x.numel(), y.numel(), V.numel(), U.numel()) < 400 * 300
