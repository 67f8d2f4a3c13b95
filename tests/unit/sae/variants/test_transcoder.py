"""The transcoder: learns a known map, equals a dense reference in value and every gradient, is the SAE on one site."""

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import Transcoder, load
from shared.sae.config import DictionaryConfig
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.sae.variants.transcoder import TranscoderConfig
from tests.dense import assert_same_gradients, dense_loss
from tests.learning import LearningSAE

SITES = Sites(("layers.2.mlp_in",), ("layers.2.mlp_out",))
D_IN, D_OUT, LATENTS, ROWS = 9, 7, 40, 32


def make(sites: Sites = SITES, dtype: torch.dtype = torch.float32, **given: Any) -> Objective:
    """A transcoder in learning, random."""
    given = {"d_in": D_IN, "d_out": D_OUT, "d_latent": LATENTS, "k": 4, "pre_bias": False, **given}
    known = {field.name for field in fields(LearningConfig)}
    config = TranscoderConfig(sites=sites, **{name: value for name, value in given.items() if name not in known})
    learning = LearningConfig(**{name: value for name, value in given.items() if name in known})
    made = Transcoder(config, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Objective(made, learning)


def pairs(rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """What is read, with a mean, and what must be written, by some map of it."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(rows, D_IN, generator=generator, dtype=dtype) * 3 + 1
    map_DD = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return x_ND, torch.relu(x_ND @ map_DD) + 2


def test_value_and_every_gradient() -> None:
    objective = make(dtype=torch.float64, auxk_alpha=0.5)
    made = objective.dictionary
    assert isinstance(made, Transcoder)
    x_ND, y_ND = pairs(ROWS, torch.float64)
    initialise(objective, None, x_ND, None, y_ND)
    dead_F = torch.arange(LATENTS) < 6
    losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead_F))
    expected = dense_loss(made, objective.learning, x_ND, y_ND, dead_F)
    assert losses.metrics["auxk"] > 0
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    assert_same_gradients(made, losses.total, expected)


def test_every_activation_gives_what_its_decoder_says() -> None:
    x_ND, y_ND = pairs(ROWS)
    for activation, more in {
        "topk": {},
        "batchtopk": {},
        "relu": {"k": None, "penalty": "l1", "penalty_weight": 0.1},
        "jumprelu": {"k": None, "penalty": "l0", "penalty_weight": 0.1},
        "gated": {"k": None, "penalty": "l1", "penalty_weight": 0.1},
    }.items():
        objective = make(activation=activation, **more)
        initialise(objective, None, x_ND, None, y_ND)
        made = objective.dictionary
        output = made(x_ND)
        dense_NF = output.latents.to_dense(LATENTS)
        expected = (dense_NF @ made.W_dec + made.b_dec) / made.output_scale + made.output_mean
        torch.testing.assert_close(output.x_hat, expected.detach(), rtol=1e-4, atol=1e-4)
        losses = objective.losses(x_ND, y_ND)
        losses.total.backward()
        assert all(parameter.grad is not None for parameter in made.parameters())
        assert 0 < float(losses.metrics["fvu"]) < 1


def test_learns_a_planted_map() -> None:
    """y = B relu(C x): FVU below 0.05, and nine units of ten found at a cosine above 0.95 on both sides."""
    d, units, latents, rate, steps = 48, 40, 96, 2e-2, 500
    generator = torch.Generator().manual_seed(3)
    read_UD = torch.linalg.qr(torch.randn(d, units, generator=generator))[0].T
    written_UD = F.normalize(torch.randn(units, d, generator=generator), dim=1)
    generator.manual_seed(4)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        """Few units are on in a row, and half of those are negative, which the map must leave out."""
        shape = (rows, units)
        codes_NU = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.15)
        x_ND = codes_NU @ read_UD
        return x_ND, torch.relu(x_ND @ read_UD.T) @ written_UD

    objective = make(d_in=d, d_out=d, d_latent=latents, k=8)
    made = objective.dictionary
    x_ND, y_ND = draw(4096)
    initialise(objective, None, x_ND, None, y_ND)
    optimiser, dead = make_optimiser(made, AdamConfig(lr=rate)), DeadLatents(latents, 20_000)
    for step in range(steps):
        x_ND, y_ND = draw(512)
        losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead.mask()))
        losses.total.backward()
        optimiser.step(rate * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps)))
        dead.update(losses.fired, len(x_ND))
    x_ND, y_ND = draw(8192)
    error_ND = made(x_ND).x_hat - y_ND
    fvu = float(error_ND.square().sum() / (y_ND - y_ND.mean(0)).square().sum())
    found_UF = torch.minimum(
        read_UD @ F.normalize(made.W_enc.detach(), dim=1).T, written_UD @ F.normalize(made.W_dec.detach(), dim=1).T
    )
    assert fvu < 0.05
    assert float((found_UF.amax(1) > 0.95).double().mean()) >= 0.9


def test_reads_equal_to_writes_is_the_sae_bit_for_bit() -> None:
    """Started from data and trained for some steps with dead latents."""
    same = Sites.of("layers.2.resid_post")
    given: dict[str, Any] = {"d_latent": 90, "k": 3, "auxk_alpha": 0.5, "dead_after_tokens": 40}
    sae = LearningSAE(d_model=D_IN, sites=same, generator=torch.Generator().manual_seed(0), **given)
    transcoder = make(same, d_in=D_IN, d_out=D_IN, pre_bias=True, **given)
    assert transcoder.dictionary.state_dict().keys() == sae.state_dict().keys()
    for objective in (sae.objective, transcoder):
        made = objective.dictionary
        generator = torch.Generator().manual_seed(7)
        initialise(objective, None, torch.randn(200, D_IN, generator=generator))
        optimiser = make_optimiser(made, AdamConfig(lr=1e-2))
        dead = DeadLatents(90, 40)
        for _ in range(12):
            losses = objective.losses(torch.randn(20, D_IN, generator=generator), inputs=StepInputs(dead=dead.mask()))
            losses.total.backward()
            optimiser.step()
            dead.update(losses.fired, 20)
        assert dead.mask().any()
    for name, tensor in transcoder.dictionary.state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name]), name


def test_saved_and_loaded(tmp_path: Any) -> None:
    objective = make()
    x_ND, y_ND = pairs(ROWS)
    initialise(objective, None, x_ND, None, y_ND)
    made = objective.dictionary
    made.save_pretrained(tmp_path / "sae", {"steps": 3}, objective.learning.to_dict())
    loaded = load(tmp_path / "sae")
    assert isinstance(loaded, Transcoder)
    assert loaded.config == made.config
    assert loaded.sites == SITES
    assert torch.equal(loaded(x_ND).x_hat, made(x_ND).x_hat)
    with pytest.raises(GranaryError, match=r"it is a transcoder, not a sae: use granary\.load"):
        SAE.from_pretrained(tmp_path / "sae")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pre_bias": True}, r"sae\.pre_bias=true subtracts b_dec, which lies in the space that is written"),
        ({"normalisation": "layer_norm"}, "layer_norm scales back by what was read"),
        ({"shift_back": False}, "shift_back=false is for normalisation=layer_norm alone"),
    ],
)
def test_what_makes_no_sense_between_two_places(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        make(**given)


def test_a_sae_of_two_places_is_refused_with_the_remedy() -> None:
    kind: type[DictionaryConfig] = SAE.config_class
    with pytest.raises(GranaryError, match="use variant=transcoder for two places"):
        kind.of(SITES.widths({"layers.2.mlp_in": 4, "layers.2.mlp_out": 5}), {"d_latent": 8, "k": 2}, SITES)
