"""Tied decoders of a CLT: fewer parameters, the same function as their rows written out, learnt, saved and exported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.basics.errors import GranaryError
from shared.sae import CLT, load
from shared.sae.learn.init import initialise
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sets import convert_set
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants.clt_part import CLTPart, LayerShare
from tests.variants import batch, make

LAYERS, WIDTH, F = 3, 6, 20
PLACES = (
    Sites(tuple(f"layers.{n}.mlp_in" for n in range(LAYERS)), tuple(f"layers.{n}.mlp_out" for n in range(LAYERS))),
    SiteWidths((9, 6, 5), (WIDTH,) * LAYERS),
)
TYINGS = ["per_source", "per_target"]


def started(tying: str, steps: int = 0, **given: object) -> tuple[Objective, CLT, torch.Tensor]:
    """From data, and some steps on."""
    objective = make("clt", tying=tying, places=PLACES, activation="batchtopk", **given)
    x_ND, y_ND = batch(objective, 200)
    initialise(objective, None, x_ND, None, y_ND)
    optimiser = make_optimiser(objective.dictionary, AdamConfig(lr=1e-2))
    for _ in range(steps):
        objective.losses(x_ND, y_ND).total.backward()
        optimiser.step()
    assert isinstance(objective.dictionary, CLT)
    return objective, objective.dictionary, x_ND


@pytest.mark.parametrize("tying", TYINGS)
def test_what_is_tied(tying: str) -> None:
    """Parts of a row are one direction times a share each, or the part of every layer's latent of that number."""
    _, made, _ = started(tying)
    rows = [layer.W_dec.detach().view(F, -1, WIDTH) for layer in made.groups]
    assert [one.shape[1] for one in rows] == [3, 2, 1]
    if tying == "per_source":
        for one in rows:
            cosine = torch.nn.functional.cosine_similarity(one, one[:, -1:], dim=2).abs()
            torch.testing.assert_close(cosine, torch.ones_like(cosine))
            torch.testing.assert_close(one.flatten(1).norm(dim=1), torch.ones(F))
    else:
        assert torch.equal(rows[0][:, 1:], rows[1])
        assert torch.equal(rows[0][:, 2:], rows[2])
    decoders = sum(p.numel() for name, p in made.named_parameters() if "W_row" in name or "targets" in name)
    assert decoders == LAYERS * F * WIDTH


@pytest.mark.parametrize("tying", TYINGS)
def test_it_is_the_clt_of_its_rows(tying: str) -> None:
    """Encoding, decoding, and the start's scale, are those of an untied CLT with the rows written out."""
    _, made, x_ND = started(tying, steps=2)
    plain = make("clt", places=PLACES, activation="batchtopk").dictionary
    wanted = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in made.untied().items() if name in wanted})
    torch.testing.assert_close(made(x_ND).x_hat, plain(x_ND).x_hat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tying", TYINGS)
def test_learns_keeps_unit_norm_and_is_saved(tying: str, tmp_path: Path) -> None:
    first = started(tying)[0]
    objective, made, x_ND = started(tying, steps=60)
    _, y_ND = batch(objective, 200)
    before, after = (float(one.losses(x_ND, y_ND).metrics["fvu"]) for one in (first, objective))
    assert after < 0.8 * before
    for name, role in made.roles().items():
        if role.unit_rows:
            torch.testing.assert_close(made.get_parameter(name).norm(dim=1), torch.ones(F))
    made.save_pretrained(tmp_path / "tied")
    loaded = load(tmp_path / "tied")
    assert isinstance(loaded, CLT)
    assert loaded.config == made.config
    assert torch.equal(loaded(x_ND).x_hat, made(x_ND).x_hat)


@pytest.mark.parametrize("tying", TYINGS)
def test_exported_with_its_rows_written_out(tying: str, tmp_path: Path) -> None:
    _, made, _ = started(tying)
    made.save_pretrained(tmp_path / "tied", {"model": {"id": "some/model"}})
    assert convert_set(str(tmp_path / "tied"), tmp_path / "there", "circuit_tracer") == "granary clt"
    for number, layer in enumerate(made.groups):
        found = load_file(tmp_path / "there" / f"W_dec_{number}.safetensors")[f"W_dec_{number}"]
        scaled = layer.W_dec.detach().view(F, -1, WIDTH) / made.output_scale[number:, None]
        torch.testing.assert_close(found, scaled, rtol=1e-5, atol=1e-6)


def test_wrong_words_are_one_line() -> None:
    with pytest.raises(GranaryError, match=r"variant\.tying='layers': choose from none, per_source, per_target"):
        make("clt", tying="layers")
    with pytest.raises(GranaryError, match=r"sites of one width, not \[4, 7, 8\]: use per_target or none"):
        make("clt", tying="per_source")
    with pytest.raises(GranaryError, match="tying=per_source with parallel=layers"):
        CLTPart(started("per_source")[1].config, LayerShare((0, 2)))
