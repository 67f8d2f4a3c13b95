"""Losses against their written formulas, and the faults that others shipped, each by name."""

import pytest
import torch

from shared.kernels import DeadRows
from shared.sae.learn.losses import auxk_loss, reconstruction_weight, weighted_square_error
from tests.learning import LearningSAE

D, F, K, N = 12, 60, 5, 41


def make_sae(seed=0, **overrides):
    fields = {"d_model": D, "d_latent": F, "k": K, "normalisation": "none", **overrides}
    generator = torch.Generator().manual_seed(seed)
    sae = LearningSAE(**fields, generator=generator).double()
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.b_enc.normal_(generator=generator)
        sae.b_dec.normal_(generator=generator)
        sae.input_variance.uniform_(0.5, 2.0, generator=generator)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return sae, x


def dense_losses(sae, x, dead=None):
    """The same losses with plain autograd over the dense [N, F] activations."""
    config = sae.choices
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)

    def keep(matrix, k):
        kept, indices = matrix.topk(k)
        return torch.zeros_like(matrix).scatter(1, indices, kept)

    def reconstruction(k):
        error = keep(z, k) @ sae.W_dec + sae.b_dec - x
        if config.loss == "fvu":
            return error, error.square().sum(1).mean() / sae.input_variance.sum()
        return error, (error.square().mean(0) / sae.input_variance).mean()

    error, total = reconstruction(config.k)
    if config.multi_topk_weight:
        total = total + config.multi_topk_weight * reconstruction(4 * config.k)[1]
    if dead is not None and dead.any():
        residual = -error.detach()
        z_dead = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
        z_dead = torch.where(z_dead > 0, z_dead, config.auxk_slope * z_dead).masked_fill(~dead, -torch.inf)
        k_aux = min(D // 2, int(dead.sum()))
        e_hat = keep(z_dead, k_aux) @ sae.W_dec
        aux = ((residual - e_hat).square().sum(1) / residual.square().sum(1)).mean()
        total = total + config.auxk_alpha * min(int(dead.sum()) / (D // 2), 1) * aux
    return total


def gradients(loss, sae):
    return dict(zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters())), strict=True))


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("loss", ["fvu", "fvu_per_dim"])
@pytest.mark.parametrize("multi", [0.0, 0.125])
@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_value_and_every_gradient(kernels, loss, multi, num_dead):
    sae, x = make_sae(loss=loss, multi_topk_weight=multi, auxk_alpha=0.5)
    sae.kernels = kernels
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:num_dead] = True
    expected = dense_losses(sae, x, dead)
    losses = sae.losses(x, dead)
    torch.testing.assert_close(losses.total, expected)
    expected_grads = gradients(expected, sae)
    for name, grad in gradients(losses.total, sae).items():
        torch.testing.assert_close(grad, expected_grads[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck_of_the_composed_step(fast):
    """Along random directions, or number by number."""
    sae, x = make_sae(d_latent=20, multi_topk_weight=0.125)
    x = x[:6]
    names = [name for name, _ in sae.named_parameters()]

    def loss(*tensors):
        originals = dict(sae.named_parameters())
        with torch.no_grad():  # the same storage, so that the step under test sees the perturbed values
            for name, tensor in zip(names, tensors, strict=True):
                originals[name].copy_(tensor)
        total = sae.losses(x).total
        grads = torch.autograd.grad(total, [originals[name] for name in names])
        # The surrogate has the value of the loss and, for autograd, the gradients that the step computed.
        return total.detach() + sum(
            ((tensor - tensor.detach()) * grad).sum() for tensor, grad in zip(tensors, grads, strict=True)
        )

    inputs = [parameter.detach().clone().requires_grad_() for parameter in sae.parameters()]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=fast)


def test_auxk_gradient_reaches_encoder():
    sae, x = make_sae(auxk_alpha=1.0)
    with torch.no_grad():
        sae.b_enc[:10] = -50  # never picked by the main path
        sae.b_enc[10:20] = 0.0
    dead = torch.zeros(F, dtype=torch.bool)
    dead[10:20] = True
    losses = sae.losses(x, dead)
    without = gradients(losses.reconstruction * 0 + sae.losses(x).total, sae)
    with_aux = gradients(losses.total, sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        change = (with_aux[name] - without[name]).abs().reshape(F, -1).sum(1)
        assert (change[10:20] > 1e-6).all(), name
        assert (change[20:] == 0).all(), f"{name}: AuxK moved a living latent"
    assert torch.equal(with_aux["b_dec"], without["b_dec"]), "AuxK moved b_dec"


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_slope_reaches_latents_below_zero_on_every_token(slope):
    sae, x = make_sae(auxk_alpha=1.0, auxk_slope=slope)
    with torch.no_grad():
        sae.b_enc[10:20] = -50
    found = gradients(sae.losses(x, torch.arange(F) // 10 == 1).total, sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert ((found[name][10:20] != 0).reshape(10, -1).any(1) == (slope > 0)).all(), name


def test_multi_topk_gradient_reaches_encoder():
    sae, x = make_sae(multi_topk_weight=1.0)
    plain, _ = make_sae()
    extra = gradients(sae.losses(x).total, sae)["W_enc"] - gradients(plain.losses(x).total, plain)["W_enc"]
    torch.testing.assert_close(
        extra, gradients(dense_losses(sae, x), sae)["W_enc"] - gradients(dense_losses(plain, x), plain)["W_enc"]
    )
    assert float(extra.norm()) > 1e-3


def test_auxk_regresses_onto_x_minus_xhat():
    sae, x = make_sae()
    dead = torch.arange(10, 30)
    with torch.no_grad():
        x_hat = sae(x).x_hat
        residual, centred = x - x_hat, x - sae.b_dec
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec]

    @torch.no_grad()
    def e_hat():
        z = torch.relu(centred @ sae.W_enc[dead].T + sae.b_enc[dead])
        kept, indices = z.topk(D // 2)
        return torch.zeros_like(z).scatter(1, indices, kept) @ sae.W_dec[dead]

    def aux():
        rows = [parameter.index_select(0, dead) for parameter in parameters]
        return auxk_loss(residual, centred, DeadRows.alone(*rows), D // 2)

    before = float((residual - e_hat()).norm())
    for _ in range(300):
        grads = torch.autograd.grad(aux(), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= grad
    assert float((residual - e_hat()).norm()) < 0.7 * before
    cosine = torch.nn.functional.cosine_similarity(e_hat().flatten(), residual.flatten(), dim=0)
    assert float(cosine) > 0.5


def test_auxk_scales_with_the_dead_count():
    generator = torch.Generator().manual_seed(0)
    residual, centred = torch.randn(2, N, D, generator=generator).unbind(0)
    silent = (torch.zeros(3, D), torch.full((3,), -1.0), torch.ones(3, D))  # e_hat = 0: the ratio is exactly 1
    assert float(auxk_loss(residual, centred, DeadRows.alone(*silent), 6)) == pytest.approx(0.5)
    assert float(auxk_loss(residual, centred, DeadRows.alone(*silent), 2)) == pytest.approx(1.0)


def test_auxk_of_a_perfect_reconstruction_is_finite():
    rows = (torch.ones(2, D, requires_grad=True), torch.zeros(2), torch.ones(2, D))
    loss = auxk_loss(torch.zeros(N, D), torch.zeros(N, D), DeadRows.alone(*rows), 2)
    (grad,) = torch.autograd.grad(loss, rows[0])
    assert float(loss.detach()) == 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("loss", ["fvu", "fvu_per_dim"])
def test_loss_does_not_depend_on_how_the_batch_is_cut(loss):
    sae, x = make_sae(loss=loss, multi_topk_weight=0.125)
    x = x[:40]
    dead = torch.arange(F) < 20
    whole = sae.losses(x, dead).total
    parts = torch.stack([sae.losses(part, dead).total for part in x.split(10)])
    torch.testing.assert_close(parts.mean(), whole)


def test_reconstruction_weights_are_the_two_fvus():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, D, generator=generator) * torch.arange(1, D + 1)
    error = torch.randn(500, D, generator=generator)
    variance = x.var(0, correction=0)
    ratio_of_sums = error.square().sum() / (x - x.mean(0)).square().sum()
    mean_of_ratios = (error.square().sum(0) / (x - x.mean(0)).square().sum(0)).mean()
    weights = {loss: reconstruction_weight(variance, loss) for loss in ("fvu", "fvu_per_dim")}
    torch.testing.assert_close(weighted_square_error(error, weights["fvu"]), ratio_of_sums)
    torch.testing.assert_close(weighted_square_error(error, weights["fvu_per_dim"]), mean_of_ratios)


def test_a_constant_dimension_does_not_own_the_per_dimension_loss():
    variance = torch.tensor([1.0, 1.0, 0.0])
    assert reconstruction_weight(variance, "fvu_per_dim").isfinite().all()


def test_metrics_are_those_of_the_batch():
    sae, x = make_sae(loss="fvu_per_dim", multi_topk_weight=0.125)
    losses = sae.losses(x, torch.arange(F) < 3)
    output = sae(x)
    fvu = (output.x_hat - x).square().sum(1).mean() / sae.input_variance.sum()
    torch.testing.assert_close(losses.metrics["fvu"], fvu)
    assert float(losses.metrics["l0"]) == pytest.approx(float((output.latents.indices >= 0).sum()) / N)
    assert set(losses.metrics) == {"reconstruction", "fvu", "l0", "auxk", "multi_topk"}
    assert torch.equal(losses.latents.indices, output.latents.indices)
