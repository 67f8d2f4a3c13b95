"""Crosscoders by the configuration's own words: over layers of one store, and over a pair of stores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import Crosscoder, load
from shared.sae.folder import describe
from shared.sae.sites import Sites
from tests.training import Runs, assert_same_run

ONE, TWO = "layers.1.resid_post", "layers.2.resid_post"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_configs: None, planted_store: Any) -> Runs:
    folder = tmp_path_factory.mktemp("crosscoder")
    planted_store(folder / "store", hooks=(ONE, TWO))
    planted_store(folder / "chat", hooks=(ONE,))
    return Runs(folder, "variant=crosscoder", "sae.expansion=4", "schedule.tokens=1_000")


@pytest.mark.parametrize("sae", ["topk", "jumprelu"])
def test_over_layers(runs: Runs, sae: str) -> None:
    k = [] if sae == "topk" else ["sae.k=null"]
    out = runs(sae, f"sae={sae}", *k, "reads=layers.*.resid_post", "variant.gate=sum")
    made = load(out)
    assert isinstance(made, Crosscoder)
    assert made.sites == Sites.of(ONE, TWO)
    assert made.config.gate == "sum"
    assert made.config.d_latent == 96
    lines = read_metrics(out)
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]


def test_over_models_stopped_and_continued(runs: Runs) -> None:
    words = (
        f"reads=[{ONE},chat:{ONE}]",
        f"store.beside=[{{name:chat,url:{runs.folder / 'chat'}}}]",
        "schedule.tokens=480",
    )
    straight = runs("pair", *words)
    assert describe(straight).sites == Sites.of(ONE, f"chat:{ONE}")
    runs.stopped("broken", *words, step=22)
    assert_same_run(straight, runs("broken", *words))


def test_a_store_of_other_tokens_is_refused(runs: Runs, planted_store: Any, tmp_path: Path) -> None:
    planted_store(tmp_path / "other", hooks=(ONE,), seed=1)
    with pytest.raises(GranaryError, match=r"holds other contexts than .*their mask differ"):
        runs("bad", f"reads=[{ONE},x:{ONE}]", f"store.beside=[{{name:x,url:{tmp_path / 'other'}}}]")


@pytest.mark.slow
def test_scored_with_what_the_pair_has_in_common(runs: Runs) -> None:
    """The page and the figures of the difference, and figures of each latent; without a language model."""
    out = runs(
        "scored", f"reads=[{ONE},chat:{ONE}]", f"store.beside=[{{name:chat,url:{runs.folder / 'chat'}}}]", "sae.k=4"
    )
    command = [
        sys.executable, "-m", "stage_eval", f"sae.path={out}", f"out_dir={out}", f"store.url={runs.folder / 'store'}",
        f"store.beside=[{{name:chat,url:{runs.folder / 'chat'}}}]",
    ]  # fmt: skip
    done = subprocess.run([*command, "downstream=false"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "eval.json").read_text())
    found = figures["differences"]
    assert (found["first"], found["second"]) == (ONE, f"chat:{ONE}")
    assert sum(found["latents"]) == found["alive"] > 10
    # Both stores hold the same activations: what is one's is the other's.
    assert found["specific_first"] == found["specific_second"] == 0
    assert found["only_first"] + found["only_second"] <= 0.05 * found["alive"]
    assert set(figures["reconstruction"]["sites"]) == {ONE, f"chat:{ONE}"}
    latents = load_file(out / "latents.safetensors")
    assert latents["relative_norm"].shape == latents["nu_error"].shape == (96,)
    assert "have in common" in (out / "report.html").read_text()
