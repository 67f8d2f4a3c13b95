"""Starting values that depend on the activation, and the choices of scale and directions."""

import pytest
import torch

from shared.sae.groups import draw_share, random_unit_rows
from shared.sae.learn import init
from shared.sae.learn.activations import TopKRule
from shared.sae.learn.init import grid_search, into_subspace
from tests.learning import LearningSAE

D, F = 12, 60


def data(n=1500, rank=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:rank]
    codes = torch.randn(n, rank, generator=generator) * torch.linspace(3, 0.5, rank)
    return codes @ basis + torch.linspace(-1, 1, D), basis


def initialised(activation, x, **fields):
    fields = {"d_model": D, "d_latent": F, "activation": activation, **fields}
    sae = LearningSAE(**fields, generator=torch.Generator().manual_seed(0))
    sae.initialise(None, x)
    return sae


def fvu(sae, x):
    return float((sae(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("activation", "fields"),
    [("topk", {"k": 4}), ("batchtopk", {"k": 4}), ("relu", {}), ("jumprelu", {}), ("gated", {})],
)
def test_the_scale_minimises_the_loss_on_the_sample(activation, fields):
    """But for topk and batchtopk, which begin 1.25 times as far."""
    x, _ = data(1000)
    sae = initialised(activation, x, **fields)
    with torch.no_grad():
        if "k" in fields:
            sae.W_enc.div_(TopKRule.overshoot)
        if activation == "batchtopk":
            sae.activation.threshold.div_(TopKRule.overshoot)
    best = fvu(sae, x)
    assert best < 1
    for factor in (0.8, 1.25):
        with torch.no_grad():
            sae.W_enc.mul_(factor)
            if activation == "batchtopk":
                sae.activation.threshold.mul_(factor)
            assert fvu(sae, x) > best
            sae.W_enc.div_(factor)
            if activation == "batchtopk":
                sae.activation.threshold.div_(factor)


def test_batchtopk_starts_at_the_samples_threshold():
    x, _ = data(1000)
    latents = initialised("batchtopk", x, k=4).encode(x)
    assert float((latents.indices >= 0).sum()) / len(x) == pytest.approx(4, rel=0.01)


def test_transpose_is_the_decoder_itself():
    x, _ = data()
    sae = initialised("relu", x, encoder_init="transpose")
    assert torch.equal(sae.W_enc, sae.W_dec)


def test_norm_search_gives_both_the_norm_that_is_best():
    x, _ = data(1000)
    sae = initialised("relu", x, encoder_init="norm_search", unit_norm_decoder=False)
    assert torch.equal(sae.W_enc, sae.W_dec)
    norms = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, norms[0].expand(F))
    best, norm = fvu(sae, x), float(norms[0])
    for other in (norm - 0.1, norm + 0.1):
        with torch.no_grad():
            for weight in (sae.W_enc, sae.W_dec):
                weight.mul_(other / norm)
            assert fvu(sae, x) > best
            for weight in (sae.W_enc, sae.W_dec):
                weight.mul_(norm / other)


def test_grid_search_finds_a_minimum_between_its_points_and_at_an_end():
    coarse = [0.5, 1.0, 2.0, 4.0]
    assert grid_search(lambda point: (point - 1.3) ** 2, coarse, steps=29) == pytest.approx(1.3, abs=0.03)
    assert grid_search(lambda point: point, coarse, steps=10) == 0.5


def test_active_subspace():
    x, basis = data(rank=5)
    sae = initialised("topk", x, k=4, init_subspace=5)
    rows = sae.W_dec.detach()
    torch.testing.assert_close(rows @ basis.T @ basis, rows, rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(F))
    assert fvu(sae, x) < fvu(initialised("topk", x, k=4), x)


def test_subspace_of_all_directions_is_a_rotation():
    x, _ = data()
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    torch.testing.assert_close(into_subspace(weight, x, D) @ into_subspace(weight, x, D).T, weight @ weight.T)


def test_layer_norm_may_reconstruct_raw_activations():
    x, _ = data()
    sae = initialised("topk", 5 * x, k=4, normalisation="layer_norm", shift_back=False)
    torch.testing.assert_close(sae.b_dec.detach(), 5 * x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.input_variance, 25 * x.var(0, correction=0), rtol=1e-4, atol=1e-4)
    losses = sae.losses(5 * x)
    error = (sae(5 * x).x_hat - 5 * x).square().sum(1).mean()
    torch.testing.assert_close(losses.reconstruction, error / sae.input_variance.sum())


@pytest.mark.parametrize("shape", [(10_000, 16), (8_195, 7), (4_097, 33)])
def test_rows_drawn_in_blocks_are_those_drawn_at_once(shape):
    whole, blocks = torch.empty(shape), torch.empty(shape)
    random_unit_rows(whole, torch.Generator().manual_seed(3))
    draw_share(blocks, 0, shape[0], torch.Generator().manual_seed(3))
    assert torch.equal(whole, blocks)


@pytest.mark.parametrize(("activation", "penalty"), [("relu", "l1"), ("jumprelu", "l0")])
def test_a_start_in_parts_is_the_start(monkeypatch, activation, penalty):
    """Of activations that let half of all latents fire: only so many pairs are in memory at a time."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def started():
        generator = torch.Generator().manual_seed(1)
        fields = {"d_model": 8, "d_latent": 32, "k": None, "activation": activation, "penalty": penalty}
        sae = LearningSAE(**fields, penalty_weight=0.1, generator=generator)
        sae.initialise(None, x)
        return sae.state_dict()

    whole = started()
    monkeypatch.setattr(init, "SEARCH_PAIRS", 32 * 10)
    for name, tensor in started().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7)
