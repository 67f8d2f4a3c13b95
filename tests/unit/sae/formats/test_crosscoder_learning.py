"""crosscoder_learning's folders, read and written: the same latents fire, and what is written is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae.loading import convert, detect, load, load_any
from shared.sae.sites import Sites
from tests.circuits import PROVENANCE, assert_same, started
from tests.foreign_transcoders import SITES, D, crosscoder_learning, tokens, write_crosscoder

PLACES = Sites.of("layers.1.resid_post", "layers.2.resid_post")


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_f11_what_is_chosen_by_a_norm_is_decoded_without(tmp_path: Path, code: int, normalised: bool) -> None:
    write_crosscoder(tmp_path / "theirs", code, normalised=normalised)
    assert detect(tmp_path / "theirs") == "crosscoder_learning"
    made, _ = load_any(tmp_path / "theirs")
    assert made.config.kind == "crosscoder"
    assert made.config.activation == ("batchtopk" if code == 4 else "jumprelu")
    x_ND = tokens(SITES * D)
    assert_same(made, x_ND, *crosscoder_learning(tmp_path / "theirs", x_ND))
    convert(tmp_path / "theirs", tmp_path / "ours", "granary")
    assert torch.equal(load(tmp_path / "ours")(x_ND).x_hat, made(x_ND).x_hat)


def test_folders_of_the_hub_and_without_a_threshold(tmp_path: Path) -> None:
    x_ND = tokens(SITES * D)
    for hub, batchtopk in ((True, True), (True, False), (False, False)):
        theirs = tmp_path / f"{hub}-{batchtopk}"
        write_crosscoder(theirs, 2, normalised=True, batchtopk=batchtopk, hub=hub)
        made, _ = load_any(theirs)
        assert made.config.activation == ("jumprelu" if batchtopk else "relu")
        assert_same(made, x_ND, *crosscoder_learning(theirs, x_ND))


@pytest.mark.parametrize(
    "given",
    [
        {"activation": "batchtopk"},
        {"activation": "batchtopk", "normalisation": "none"},
        {"activation": "relu", "normalisation": "scale"},
    ],
    ids=lambda given: "-".join(given.values()),
)
def test_written_crosscoders_compute_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    made, x_ND = started("crosscoder", PLACES, pre_bias=False, **given)
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "crosscoder_learning")
    assert_same(made, x_ND, *crosscoder_learning(tmp_path / "theirs", x_ND))
    again, _ = load_any(tmp_path / "theirs")
    assert (again.config.activation, again.config.k) == (made.config.activation, made.config.k)
    assert_same(again, x_ND, *crosscoder_learning(tmp_path / "theirs", x_ND))


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_crosscoder(tmp_path / "decoupled", 5, normalised=False)
    with pytest.raises(GranaryError, match="code_normalization_id=5"):
        load_any(tmp_path / "decoupled")
    cases: dict[str, tuple[Sites, dict[str, Any]]] = {
        "no topk crosscoders": (PLACES, {"activation": "topk"}),
        "no gate=sum: train with": (PLACES, {"activation": "batchtopk", "gate": "sum"}),
        "give back the sites that they read": (
            Sites(("layers.1.mlp_in", "layers.2.mlp_in"), ("layers.1.mlp_out", "layers.2.mlp_out")),
            {"activation": "relu"},
        ),
    }
    for number, (message, (sites, given)) in enumerate(cases.items()):
        made, _ = started("crosscoder", sites, pre_bias=False, **given)
        made.save_pretrained(tmp_path / str(number), PROVENANCE)
        with pytest.raises(GranaryError, match=message):
            convert(tmp_path / str(number), tmp_path / "out", "crosscoder_learning")
