"""The crosscoder: an SAE on one site, equal weight for sites of unequal norm, gates, and differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import Crosscoder, load
from shared.sae.diffing import LatentScaling, cosines, relative_norms
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites, SiteWidths
from tests.learning import LearningSAE
from tests.variants import batch, make

D, ATOMS = 32, 40


def crosscoder(**given: Any) -> tuple[Objective, Crosscoder, Tensor]:
    objective = make("crosscoder", **given)
    x_ND, _ = batch(objective, 200)
    initialise(objective, None, x_ND)
    made = objective.dictionary
    assert isinstance(made, Crosscoder)
    return objective, made, x_ND


def learn(objective: Objective, draw: Any, steps: int = 250, rate: float = 1e-2) -> None:
    made = objective.dictionary
    initialise(objective, None, draw(2048))
    optimiser, dead = make_optimiser(made, AdamConfig(lr=rate)), DeadLatents(made.config.d_latent, 10_000)
    for step in range(steps):
        losses = objective.losses(draw(256), inputs=StepInputs(dead=dead.mask()))
        losses.total.backward()
        optimiser.step(rate * min(1.0, (steps - step) / (0.3 * steps)))
        dead.update(losses.fired, 256)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_of_one_site_it_is_the_sae_bit_for_bit(activation: str) -> None:
    given: dict[str, Any] = {"d_latent": 60, "k": 3, "auxk_alpha": 0.5, "activation": activation}
    sae = LearningSAE(d_model=9, generator=torch.Generator().manual_seed(0), **given)
    places = (Sites.of("a"), SiteWidths((9,), (9,)))
    for gate in ("joint", "sum") if activation == "topk" else ("joint",):
        one = make("crosscoder", places=places, gate=gate, **given)
        sae = LearningSAE(d_model=9, generator=torch.Generator().manual_seed(0), **given)
        for objective in (sae.objective, one):
            generator = torch.Generator().manual_seed(7)
            initialise(objective, None, torch.randn(200, 9, generator=generator) + 1)
            optimiser = make_optimiser(objective.dictionary, AdamConfig(lr=1e-2))
            for _ in range(8):
                losses = objective.losses(torch.randn(20, 9, generator=generator), inputs=StepInputs())
                losses.total.backward()
                optimiser.step()
        for name, tensor in one.dictionary.state_dict().items():
            if gate == "joint":
                assert torch.equal(tensor, sae.state_dict()[name]), name
            else:  # a division by norms that are 1 up to rounding
                torch.testing.assert_close(tensor, sae.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_f11_gate_selects_on_v_decodes_relu_z(activation: str) -> None:
    """gate=sum: the k largest of relu(z) times the summed norms; the values are relu(z) itself."""
    _, made, x_ND = crosscoder(gate="sum", activation=activation)
    z_NF = (made.centred(made.normalise(x_ND)[0]) @ made.W_enc.T + made.b_enc).detach()
    weight_F = made.site_norms().sum(0).detach()
    assert float(weight_F.max() - weight_F.min()) > 0.1
    v_NF = torch.relu(z_NF) * weight_F
    if activation == "topk":
        kept = torch.zeros_like(v_NF).scatter(1, v_NF.topk(4).indices, 1.0) * (v_NF > 0)
    else:
        threshold = made.activation.threshold
        assert isinstance(threshold, Tensor)
        kept = (v_NF > threshold).float()
    torch.testing.assert_close(made.encode(x_ND).to_dense(40), torch.relu(z_NF) * kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("gate", ["joint", "sum"])
def test_f10_row_alone_equals_in_batch(activation: str, gate: str) -> None:
    _, made, x_ND = crosscoder(gate=gate, activation=activation)
    whole = made(x_ND).x_hat
    for row in (0, 17):
        torch.testing.assert_close(made(x_ND[row : row + 1]).x_hat[0], whole[row], rtol=1e-4, atol=1e-4)


def test_f12_sites_of_unequal_norm_weigh_alike() -> None:
    """A site that is a thousand times larger has the same share of the loss."""
    objective, made, x_ND = crosscoder(places=(Sites.of("a", "b"), SiteWidths((6, 6), (6, 6))))
    scaled_ND = x_ND * torch.tensor([1.0] * 6 + [1000.0] * 6)
    other = make("crosscoder", places=(Sites.of("a", "b"), SiteWidths((6, 6), (6, 6))))
    initialise(other, None, scaled_ND)
    for name in ("W_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(
            other.dictionary.state_dict()[name], made.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name
        )
    one, two = objective.losses(x_ND), other.losses(scaled_ND)
    torch.testing.assert_close(one.total, two.total, rtol=1e-3, atol=0)


def planted(shared: float) -> tuple[Tensor, Tensor, Any]:
    """Atoms of two sites [2, A, D], whose each is (0 both, -1 the first's, 1 the second's), and a source of tokens."""
    generator = torch.Generator().manual_seed(3)
    atoms = F.normalize(torch.randn(ATOMS, D, generator=generator), dim=1).repeat(2, 1, 1)
    count = int(shared * ATOMS)
    owner_A = torch.zeros(ATOMS, dtype=torch.int64)
    owner_A[count : count + (ATOMS - count) // 2] = -1
    owner_A[count + (ATOMS - count) // 2 :] = 1
    atoms[0, owner_A == 1] = 0
    atoms[1, owner_A == -1] = 0

    def draw(rows: int) -> Tensor:
        on = torch.rand(rows, ATOMS, generator=generator) < 0.08
        codes = on * (1 + torch.rand(rows, ATOMS, generator=generator))
        return torch.cat([codes @ atoms[0], codes @ atoms[1]], 1)

    return atoms, owner_A, draw


def test_planted_latents_are_in_the_right_class() -> None:
    """60 % shared atoms, 20 % of each side alone: at least 95 % of the alive latents are classed as their atom is."""
    atoms, owner_A, draw = planted(0.6)
    places = (Sites.of("a", "chat:a"), SiteWidths((D, D), (D, D)))
    objective = make("crosscoder", places=places, d_latent=64, k=4, activation="batchtopk")
    made = objective.dictionary
    assert isinstance(made, Crosscoder)
    learn(objective, draw)
    x_ND = draw(4096)
    latents = made.encode(x_ND)
    alive_F = torch.zeros(64, dtype=torch.bool)
    alive_F[latents.indices[latents.indices >= 0].unique()] = True
    both_AD = F.normalize(torch.cat([atoms[0], atoms[1]], 1), dim=1)
    cosine_FA = made.W_dec.detach() @ both_AD.T
    truth_F = owner_A[cosine_FA.argmax(1)]
    norm_F = relative_norms(made)
    found_F = (norm_F > 0.75).long() - (norm_F < 0.25).long()
    right = (found_F == truth_F)[alive_F].float().mean()
    assert alive_F.sum() >= ATOMS
    assert float(right) >= 0.95
    scaling = LatentScaling(made)
    scaling.add(x_ND, x_ND, latents)
    sure_F = alive_F & (cosine_FA.amax(1) > 0.95)
    assert ((scaling.specific() == (truth_F != 0)) | ~sure_F).double().mean() >= 0.9


def test_f14_of_a_model_beside_itself_nothing_is_specific() -> None:
    _, _, draw = planted(0.6)
    places = (Sites.of("a", "b"), SiteWidths((2 * D, 2 * D), (2 * D, 2 * D)))
    objective = make("crosscoder", places=places, d_latent=ATOMS, k=4)
    made = objective.dictionary
    assert isinstance(made, Crosscoder)

    def twice(rows: int) -> Tensor:
        return draw(rows).repeat(1, 2)

    learn(objective, twice)
    x_ND = twice(2048)
    latents = made.encode(x_ND)
    alive = torch.bincount(latents.indices[latents.indices >= 0], minlength=ATOMS) >= 20
    norm_F, cosine_F = relative_norms(made)[alive], cosines(made)[alive]
    scaling = LatentScaling(made)
    scaling.add(x_ND, x_ND, latents)
    assert float((norm_F - 0.5).abs().max()) <= 0.02
    assert float(cosine_F.min()) > 0.95
    assert not scaling.specific()[alive].any()


def test_f15_latent_scaling_is_least_squares() -> None:
    """Every latent's beta, against torch.linalg.lstsq for that latent alone."""
    _, made, x_ND = crosscoder(places=(Sites.of("a", "b"), SiteWidths((6, 6), (6, 6))))
    scaling = LatentScaling(made)
    for part in x_ND.split(70):
        scaling.add(part, part, made.encode(part))
    betas = scaling.betas()
    normal_ND = made.normalise(x_ND)[0].double()
    f_NF = made.encode(x_ND).to_dense(40).double()
    W_dec, b_dec = made.W_dec.detach().double(), made.b_dec.detach().double()
    hat_ND = f_NF @ W_dec + b_dec
    norms = made.site_norms()
    for latent in f_NF.any(0).nonzero().flatten().tolist()[::3]:
        owner = int(norms[1, latent] > norms[0, latent])
        row_D = W_dec[latent, 6 * owner : 6 * owner + 6]
        design = (f_NF[:, latent, None] * row_D).reshape(-1, 1)
        for site in (0, 1):
            columns = slice(6 * site, 6 * site + 6)
            with_own = normal_ND - hat_ND + f_NF[:, latent, None] * W_dec[latent]
            for beta_SF, y_ND in zip(betas, (hat_ND, with_own), strict=True):
                solved = torch.linalg.lstsq(design, y_ND[:, columns].reshape(-1, 1)).solution
                assert float(beta_SF[site, latent]) == pytest.approx(float(solved), rel=1e-5, abs=1e-5)
    assert torch.isnan(betas[0][:, ~f_NF.any(0)]).all()


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, made, x_ND = crosscoder(gate="sum")
    made.save_pretrained(tmp_path / "c")
    loaded = load(tmp_path / "c")
    assert isinstance(loaded, Crosscoder)
    assert loaded.config == made.config
    assert torch.equal(loaded(x_ND).x_hat, made(x_ND).x_hat)


def test_wrong_words_are_one_line() -> None:
    with pytest.raises(GranaryError, match=r"variant\.gate='max': choose from joint, sum"):
        make("crosscoder", gate="max")
    with pytest.raises(GranaryError, match="layer_norm is for one site"):
        make("crosscoder", normalisation="layer_norm")
    with pytest.raises(GranaryError, match="between two sites of one width, not 9, 4"):
        relative_norms(crosscoder()[1])
