"""What feeds a latent, on its page: found with the run, matched by the weights' hash, led to where it is served."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.latents import Latents
from shared.latents.layout import META
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.feeds import connect
from tests.latents import synthetic_latents, synthetic_weights

FIRST, OTHER = "0" * 64, "1" * 64


def documents(latents: Latents, sha256: str) -> Documents:
    """As if they had been made from the weights of this hash."""
    made_of = {**latents.meta.dictionary, "sha256": sha256}
    return Documents(Latents(latents.io, replace(latents.meta, dictionary=made_of)), "made up")


def test_runs_side_by_side_lead_to_one_another(tmp_path: Path) -> None:
    """Layers of two dictionaries, in the folder above both runs, as a set of transcoders has it."""
    made = [synthetic_latents(tmp_path / name / "latents", 6) for name in ("layer_0", "layer_1")]
    first, second = documents(made[0], FIRST), documents(made[1], OTHER)
    made[0].notes.set_note(5, "opens a bracket")
    synthetic_weights(tmp_path / "weights", (FIRST, OTHER))
    connect([first, second], pytest.fail)
    assert second.latent(0)["feeds"]["sources"][0][:5] == [0, 5, -1.5, "../../#/latent/5", "opens a bracket"]
    assert first.latent(5)["feeds"]["targets"][0][:4] == [1, 0, -1.5, "with/1/#/latent/0"]
    assert first.latent(4)["feeds"] == {"tokens": 100, "sources": [], "targets": []}
    alone = documents(made[1], OTHER)
    connect([alone], pytest.fail)
    assert alone.latent(0)["feeds"]["sources"] == [[0, 5, -1.5, None, None, []]]


def test_weights_of_others_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    latents = synthetic_latents(tmp_path / "latents", 12)
    synthetic_weights(tmp_path / "sae" / "weights", (OTHER, OTHER))
    made, told = documents(latents, FIRST), list[str]()
    connect([made], told.append)
    assert made.latent(6)["feeds"] is None
    (tmp_path / "sae" / "weights" / META).write_text("{}")
    connect([made], told.append)
    assert made.latent(6)["feeds"] is None
    assert len(told) == 1
    assert told[0].startswith("without what feeds a latent: ")
