"""The SAE module: normalisation, encode, decode, initialisation."""

from types import SimpleNamespace

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae import SAE, SAEConfig, SparseLatents
from shared.sae.learn.activations import TopKRule
from shared.sae.learn.init import encoder_scale, geometric_median
from tests.learning import LearningSAE


def data(n=300, d=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.5, 4.0, d)
    return torch.randn(n, d, generator=generator) * scales + torch.linspace(-3, 3, d)


def statistics(x):
    return SimpleNamespace(
        mean=x.double().mean(0).numpy(),
        var=x.double().var(0, correction=0).numpy(),
        mean_norm=float(x.norm(dim=1).mean()),
    )


def make_sae(**overrides):
    fields = {"d_model": 10, "d_latent": 40, "k": 4, **overrides}
    return LearningSAE(**fields, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale", "layer_norm"])
def test_denormalise_inverts_normalise(normalisation):
    x = data()
    sae = make_sae(normalisation=normalisation)
    sae.initialise(statistics(x), x)
    normal, token_mean, token_scale = sae.normalise(x)
    torch.testing.assert_close(sae.denormalise(normal, token_mean, token_scale), x)


def test_normalisations_do_what_they_say():
    x = data()
    expected = {
        "scale": lambda y: float(y.norm(dim=1).mean()) == pytest.approx(10**0.5, rel=1e-5),
        "centre_scale": lambda y: (
            float(y.mean(0).abs().max()) < 1e-5 and float(y.square().sum(1).mean()) == pytest.approx(10, rel=1e-4)
        ),
        "layer_norm": lambda y: (
            float(y.mean(1).abs().max()) < 1e-5 and float((y.square().mean(1) - 1).abs().max()) < 1e-3
        ),
        "none": lambda y: torch.equal(y, x),
    }
    for normalisation, holds in expected.items():
        sae = make_sae(normalisation=normalisation)
        sae.initialise(statistics(x), x)
        normal = sae.normalise(x)[0]
        assert holds(normal), normalisation
        torch.testing.assert_close(sae.input_variance, normal.var(0, correction=0), rtol=1e-4, atol=1e-5)


def test_statistics_may_come_from_the_sample():
    x = data()
    given, own = make_sae(), make_sae()
    given.initialise(statistics(x), x)
    own.initialise(None, x)
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (0,)])
def test_leading_dimensions_are_kept(leading):
    sae = make_sae()
    x = torch.randn(*leading, 10)
    output = sae(x)
    assert output.x_hat.shape == x.shape
    assert output.latents.values.shape == (*leading, 4)
    assert output.latents.indices.dtype == torch.int64


def test_identity_sae_reconstructs_exactly():
    sae = LearningSAE(d_model=10, d_latent=20, k=10, normalisation="none")
    with torch.no_grad():
        eye = torch.eye(10)
        sae.W_enc.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    x = data(d=10)
    assert torch.equal(sae(x).x_hat, x)


def test_forward_equals_the_written_formula():
    x = data()
    sae = make_sae(k=3)
    sae.initialise(statistics(x), x)
    with torch.no_grad():
        sae.b_enc.normal_()
        normal = (x - sae.input_mean) * sae.input_scale
        z = torch.relu((normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        values, indices = z.topk(3)
        dense = torch.zeros_like(z).scatter(1, indices, values)
        x_hat = (dense @ sae.W_dec + sae.b_dec) / sae.input_scale + sae.input_mean
    output = sae(x)
    torch.testing.assert_close(output.x_hat, x_hat)
    torch.testing.assert_close(output.latents.to_dense(40), dense)


def test_without_pre_bias_the_encoder_sees_the_input_itself():
    sae = make_sae(normalisation="none", pre_bias=False)
    with torch.no_grad():
        sae.b_dec.fill_(5.0)
    x = data()
    shifted = make_sae(normalisation="none", pre_bias=False)
    torch.testing.assert_close(sae.encode(x).values, shifted.encode(x).values)
    torch.testing.assert_close(sae(x).x_hat, shifted(x).x_hat + 5.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_input_is_upcast_to_the_parameters(dtype):
    sae = make_sae()
    x = data().to(dtype)
    output = sae(x)
    assert output.x_hat.dtype == torch.float32
    assert torch.equal(output.x_hat, sae(x.float()).x_hat)


def test_decode_ignores_padding():
    sae = make_sae(normalisation="none")
    latents = SparseLatents(torch.tensor([[2.0, 99.0]]), torch.tensor([[3, -1]]))
    torch.testing.assert_close(sae.decode(latents), 2 * sae.W_dec[3:4].detach() + sae.b_dec.detach())


def test_initialise_lowers_the_loss_and_keeps_rows_unit():
    x = data(2000)
    sae = make_sae()
    sae.initialise(statistics(x), x[:1000])
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(sae.W_enc / sae.W_enc.norm(dim=1, keepdim=True), sae.W_dec)
    with torch.no_grad():
        sae.W_enc.div_(TopKRule.overshoot)
    best = float(sae.losses(x[:1000]).reconstruction)
    assert best < 1
    for factor in (0.9, 1.1):
        with torch.no_grad():
            sae.W_enc.mul_(factor)
            assert float(sae.losses(x[:1000]).reconstruction) > best
            sae.W_enc.div_(factor)


def test_the_same_seed_gives_the_same_sae():
    first, second = make_sae(), make_sae()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("bias_init", "point"), [("zero", lambda y: y.mean(0) * 0), ("mean", lambda y: y.mean(0))])
def test_bias_init(bias_init, point):
    x = data()
    sae = make_sae(bias_init=bias_init, normalisation="scale")
    sae.initialise(statistics(x), x)
    torch.testing.assert_close(sae.b_dec.detach(), point(sae.normalise(x)[0]))


def test_geometric_median_bias_resists_outliers():
    x = data()
    x[:3] = 1e4
    sae = make_sae(bias_init="geometric_median", normalisation="none")
    sae.initialise(statistics(x), x)
    assert float((sae.b_dec.detach() - data().mean(0)).norm()) < 1.0
    assert float((x.mean(0) - data().mean(0)).norm()) > 100


def test_geometric_median_is_the_minimum():
    points = data(50).double()
    median = geometric_median(points)

    def cost(centre):
        return float((points - centre).norm(dim=1).sum())

    for direction in torch.eye(10, dtype=torch.float64):
        assert cost(median) <= cost(median + 1e-3 * direction)
        assert cost(median) <= cost(median - 1e-3 * direction)


def test_geometric_median_on_a_data_point_and_of_bfloat16():
    points = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(points), torch.zeros(2), atol=1e-5, rtol=0)
    assert geometric_median(points.bfloat16()).dtype == torch.float32


def test_encoder_scale_is_the_least_squares_factor():
    generator = torch.Generator().manual_seed(0)
    decoded = torch.randn(50, 10, generator=generator)
    weight = torch.rand(10, generator=generator)
    assert encoder_scale(2.5 * decoded, decoded, weight) == pytest.approx(2.5, rel=1e-5)
    assert encoder_scale(-decoded, decoded, weight) == 1.0


def test_wrong_width_is_refused():
    with pytest.raises(GranaryError, match="width 10, got 12"):
        make_sae().encode(torch.randn(3, 12))


@pytest.mark.parametrize("choice", [{"kernels": "cuda"}, {"compute_dtype": "fp8"}])
def test_unknown_ways_to_compute_are_refused(choice):
    with pytest.raises(GranaryError, match="choose from"):
        SAE(SAEConfig(d_model=4, d_latent=8, k=2), **choice)


def test_bfloat16_compute_reconstructs_as_float32():
    x = data()
    sae = make_sae()
    sae.initialise(statistics(x), x)
    exact = sae(x).x_hat
    sae.compute_dtype = "bfloat16"
    torch.testing.assert_close(sae(x).x_hat, exact)


def test_constant_data_is_refused():
    with pytest.raises(GranaryError, match="nothing to reconstruct"):
        make_sae().initialise(None, torch.ones(5, 10))


def test_layer_norm_latents_without_their_tokens_are_refused():
    sae = make_sae(normalisation="layer_norm")
    latents = sae.encode(data())
    with pytest.raises(GranaryError, match="mean and scale"):
        sae.decode(SparseLatents(latents.values, latents.indices))
