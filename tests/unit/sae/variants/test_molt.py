"""The MoLT: norms without a map, planted maps found, load and collapse told, the constant rest of centred inputs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import MoLT, load
from shared.sae.latents import SparseLatents
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants.molt import MoLTConfig, read_ranks
from tests.dense import maps
from tests.sizes import Sizes
from tests.variants import OUT, batch, make


def started(**given: object) -> tuple[Objective, MoLT, Tensor, Tensor]:
    objective = make("molt", **given)
    made = objective.dictionary
    assert isinstance(made, MoLT)
    x_ND, y_ND = batch(objective, 300)
    initialise(objective, None, x_ND, None, y_ND)
    return objective, made, x_ND, y_ND


def fvu(y_hat_ND: Tensor, y_ND: Tensor) -> float:
    return float((y_hat_ND - y_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum())


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_f23_molt_gram_without_a_map(activation: str) -> None:
    """Norms, their gradients, and a whole step: no tensor as large as one map, nor as all of their norms' squares."""
    places = (Sites(("in",), ("out",)), SiteWidths((300,), (280,)))
    objective = make("molt", activation=activation, unit_norm_decoder=False, ranks={5: 2, 2: 8}, places=places)
    made = objective.dictionary
    assert isinstance(made, MoLT)
    norms_F = made.transform_norms()
    torch.testing.assert_close(norms_F, maps(made).flatten(1).norm(dim=1))
    weight_F = torch.arange(10.0)
    found = torch.autograd.grad(norms_F @ weight_F, [made.U, made.V])
    wanted = torch.autograd.grad(maps(made).flatten(1).norm(dim=1) @ weight_F, [made.U, made.V])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    x_ND, y_ND = torch.randn(40, 300), torch.randn(40, 280)
    optimiser = make_optimiser(made, AdamConfig(lr=1e-2))
    with Sizes() as seen:
        objective.losses(x_ND, y_ND, StepInputs(dead=torch.arange(10) < 3)).total.backward()
        optimiser.step()
        objective.rule.after_step(None)
        made(x_ND)
    assert seen.largest < 300 * 280 / 4


def test_norms_stay_1() -> None:
    for activation in ("topk", "batchtopk", "gated"):
        objective, made, x_ND, y_ND = started(activation=activation)
        optimiser = make_optimiser(made, AdamConfig(lr=1e-2))
        for _ in range(3):
            objective.losses(x_ND, y_ND).total.backward()
            optimiser.step()
            assert float((made.transform_norms() - 1).detach().abs().max()) > 1e-3
            objective.rule.after_step(None)
            torch.testing.assert_close(maps(made).flatten(1).norm(dim=1), torch.ones(18), rtol=1e-5, atol=1e-5)


def test_f24_molt_collapse_metric_and_load_per_rank() -> None:
    objective, made, x_ND, y_ND = started()
    metrics = {name: float(value) for name, value in objective.losses(x_ND, y_ND).metrics.items()}
    dense_NF = made.encode(x_ND).to_dense(18) > 0
    share_F = dense_NF.float().mean(0)
    assert metrics["load/max"] == pytest.approx(float(share_F.max()))
    p_F = share_F / share_F.sum()
    assert metrics["load/effective"] == pytest.approx(float(torch.special.entr(p_F).sum().exp()), rel=1e-5)
    assert metrics["load/4"] == pytest.approx(float(p_F[[0, 9]].sum()), rel=1e-5)  # the first of each of two blocks
    assert metrics["load/4"] + metrics["load/2"] + metrics["load/1"] == pytest.approx(1, rel=1e-5)
    assert set(metrics) >= set(objective.metric_names)
    assert objective.warning(metrics) is None
    with torch.no_grad():  # the same four whatever comes
        made.b_enc[:4] += 1e4
    metrics = {name: float(value) for name, value in objective.losses(x_ND, y_ND).metrics.items()}
    assert metrics["load/effective"] == pytest.approx(4, rel=1e-4)
    told = objective.warning(metrics)
    assert told is not None
    assert "nearly every token turns on the same transforms: 4.0 of 18" in told


@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale"])
def test_f25_molt_affine_rest_under_centring(normalisation: str) -> None:
    """On raw activations: maps U'V' that are linear, and a constant row for each transform where inputs are centred."""
    _, made, x_ND, _ = started(normalisation=normalisation, dtype=torch.float64)
    raw_FED = maps(made).detach() * made.input_scale / made.output_scale
    rest_FE = -raw_FED @ made.input_mean
    f_NF = made.encode(x_ND).to_dense(18)
    linear_NE = torch.einsum("nf,fed,nd->ne", f_NF, raw_FED, x_ND)
    bias_E = (made.b_dec / made.output_scale + made.output_mean).detach()
    torch.testing.assert_close(made(x_ND).x_hat, linear_NE + f_NF @ rest_FE + bias_E)
    assert bool(rest_FE.any()) == (normalisation == "centre_scale")


@pytest.mark.slow
def test_a11_planted_maps_are_found() -> None:
    """8 maps of rank 4, each behind a gate of its own: FVU below 0.05, every gate found."""
    d, number, rank = 32, 8, 4
    generator = torch.Generator().manual_seed(0)
    gates_FD = torch.linalg.qr(torch.randn(d, number, generator=generator))[0].T
    down = torch.randn(number, rank, d, generator=generator) / d**0.5
    down = down - torch.einsum("frd,gd,ge->fre", down, gates_FD, gates_FD)  # what gates say is not what maps read
    planted_FED = torch.randn(number, d, rank, generator=generator) @ down

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        """Two gates are on in a row, of strengths from 1 to 3."""
        on_NF = torch.zeros(rows, number).scatter(1, torch.rand(rows, number, generator=generator).topk(2).indices, 1.0)
        f_NF = on_NF * (1 + 2 * torch.rand(rows, number, generator=generator))
        x_ND = 3 * f_NF @ gates_FD + torch.randn(rows, d, generator=generator) @ (torch.eye(d) - gates_FD.T @ gates_FD)
        return x_ND, torch.einsum("nf,fed,nd->ne", f_NF, planted_FED, x_ND)

    places = (Sites(("in",), ("out",)), SiteWidths((d,), (d,)))
    objective = make("molt", places=places, ranks={rank: 12}, k=2, normalisation="scale")
    made = objective.dictionary
    assert isinstance(made, MoLT)
    x_ND, y_ND = draw(4096)
    initialise(objective, None, x_ND, None, y_ND)
    optimiser, dead, rate, steps = make_optimiser(made, AdamConfig(lr=1e-2)), DeadLatents(12, 5_000), 1e-2, 600
    for step in range(steps):
        x_ND, y_ND = draw(256)
        losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead.mask()))
        losses.total.backward()
        optimiser.step(rate * min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps)))
        objective.rule.after_step(None)
        dead.update(losses.fired, len(x_ND))
    x_ND, y_ND = draw(4096)
    found_GF = gates_FD @ F.normalize(made.W_enc.detach(), dim=1).T
    assert fvu(made(x_ND).x_hat, y_ND) < 0.05
    best = found_GF.max(1)
    assert float(best.values.min()) > 0.9, best
    cosine = F.cosine_similarity(maps(made).detach()[best.indices].flatten(1), planted_FED.flatten(1))
    assert float(cosine.min()) > 0.9


def test_latents_carry_what_they_read(tmp_path: Path) -> None:
    objective, made, x_ND, y_ND = started()
    made.save_pretrained(tmp_path / "molt", training=objective.learning.to_dict())
    loaded = load(tmp_path / "molt")
    assert isinstance(loaded, MoLT)
    assert loaded.config == made.config
    latents = loaded.encode(x_ND.view(3, 100, -1))
    torch.testing.assert_close(loaded.decode(latents).view(300, -1), made(x_ND).x_hat)
    assert fvu(made(x_ND).x_hat, y_ND) == pytest.approx(float(objective.losses(x_ND, y_ND).metrics["fvu"]), rel=1e-3)
    with pytest.raises(GranaryError, match=r"maps of what was read, which encode returns in \.read: keep it"):
        made.decode(SparseLatents(latents.values, latents.indices))


def test_transforms_lie_in_equal_blocks() -> None:
    config = make("molt", ranks={1: 6, 4: 2, 2: 4}).dictionary.config
    assert isinstance(config, MoLTConfig)
    assert config.rank_of_each == (4, 2, 2, 1, 1, 1) * 2
    config.check_parts(2)
    with pytest.raises(GranaryError, match=r"the 2 transforms of rank 4 do not divide among parallel\.latent=4"):
        config.check_parts(4)


@pytest.mark.parametrize("given", [{16: 1, "8": 2}, "{16:1, 8: 2}", "8:2,16:1"])
def test_ranks_in_any_spelling(given: object) -> None:
    assert read_ranks(given) == {"16": 1, "8": 2}
    assert list(read_ranks(given)) == ["16", "8"]


@pytest.mark.parametrize("given", [{16: 1.5}, {0: 1}, {"a": 1}, [1, 2], "{}", "{8:1,8:2}", {8: True}, "x", {8: -1}, 7])
def test_wrong_ranks_are_one_line(given: object) -> None:
    with pytest.raises(GranaryError, match=r"variant\.ranks=.*: a number of transforms for each rank"):
        read_ranks(given)


def test_wrong_words_are_one_line() -> None:
    with pytest.raises(GranaryError, match="a molt needs its transforms, how many of each rank: give variant"):
        read_ranks(None)
    with pytest.raises(GranaryError, match=r"variant\.ranks=\{8:3\}: no map from 9 features to 7 has a rank of 8"):
        make("molt", ranks={8: 3}, k=1)
    with pytest.raises(GranaryError, match="to itself would learn to copy it: use variant=sae"):
        make("molt", places=(Sites.of(OUT), SiteWidths((9,), (9,))))
    with pytest.raises(GranaryError, match=r"sae\.prefixes is about rows of the decoder, which a molt has none of"):
        make("molt", prefixes=(9, 18))
    with pytest.raises(GranaryError, match=r"sae\.encoder_init=norm_search is about rows"):
        make("molt", encoder_init="norm_search", unit_norm_decoder=False)
