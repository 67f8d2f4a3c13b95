"""A Lorsa from text to scores and latents, by the stages' own command lines, a MoLT beside it; what refuses one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from granary import Latents, Lorsa, MoLT, Store
from shared.sae.contexts import Contexts
from tests.cli import ForkServer

pytestmark = pytest.mark.slow

READS, WRITES = "layers.1.attn_in", "layers.1.attn_out"
HARVEST = ("debug=tiny_harvest", "hooks.layers=1", "hooks.sites=[attn_in,attn_out]", "corpus.contexts=12")
TRAIN = (
    *("debug=tiny_train", "variant=lorsa", f"reads={READS}", f"writes={WRITES}", "sae.expansion=2", "sae.k=8"),
    *("stream.batch_size=256", "schedule.tokens=10_000", "optim.lr=2e-3"),
)


@pytest.fixture(scope="module")
def run(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """Where a store, a Lorsa and its scores are."""
    here = stages.at(tmp_path_factory.mktemp("lorsa"))
    for module, words in (
        ("stage_harvest", HARVEST),
        ("stage_train", TRAIN),
        ("stage_eval", ["contexts=2"]),
    ):
        done = here.run(module, "run_dir=run", "device=cpu", *words)
        assert done.code == 0, done.stderr
    return here


@torch.no_grad()
@pytest.mark.parametrize("kind", [Lorsa, MoLT])
def test_scored(run: ForkServer, kind: type[Lorsa | MoLT]) -> None:
    """By whole contexts, and by tokens; the scores are those of the folder that Python loads."""
    folder, own = run.folder / "run", run.folder / ("run" if kind is Lorsa else "molt")
    if kind is MoLT:
        train = [word for word in TRAIN if not word.startswith(("variant", "sae.expansion"))]
        for module, words in (
            ("stage_train", [*train, "variant=molt", "variant.ranks={8:8,4:16,2:32}"]),
            ("stage_eval", ["contexts=2"]),
        ):
            done = run.run(module, "run_dir=molt", "store.url=run/store", "device=cpu", *words)
            assert done.code == 0, done.stderr
    scores: dict[str, Any] = json.loads((own / "eval.json").read_text())
    store, made = Store.open(folder / "store"), kind.from_pretrained(own / "sae")
    assert type(made) is kind
    chosen = store.contexts("heldout")[:2]
    x, y = (torch.stack([store.read_context(site, int(one)) for one in chosen]).float() for site in (READS, WRITES))
    documents = torch.from_numpy(np.asarray(store.segments(chosen))).long()
    given = Contexts.of(x, documents, torch.from_numpy(np.asarray(store.mask(chosen))))
    output, y_ND = made(given if kind is Lorsa else given.counted(x)), given.counted(y).double()
    error = (output.x_hat.double() - y_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum()
    assert scores["fvu"] == pytest.approx(float(error), rel=1e-4)
    assert scores["l0"] == pytest.approx(float((output.latents.indices >= 0).double().sum(1).mean()))
    assert scores["fvu"] < (0.7 if kind is Lorsa else 1)  # no map of a token alone is attention
    assert scores["ce_clean"] < scores["ce_spliced"] < scores["ce_zero"]
    recovered = (scores["ce_zero"] - scores["ce_spliced"]) / (scores["ce_zero"] - scores["ce_clean"])
    assert scores["loss_recovered"] == pytest.approx(recovered)


def test_inspected(run: ForkServer) -> None:
    done = run.run("stage_inspect", "run_dir=run", "device=cpu", "contexts=2")
    assert done.code == 0, done.stderr
    latents = Latents.open(run.folder / "run/latents")
    one = int(latents.table["fired"].argmax())
    assert latents.top(one)[0].value == latents.table["max"][one]
    assert latents.latent(one).promoted


def kept(folder: Path) -> dict[Path, bytes]:
    """Everything of a run that was made before."""
    made = [folder / "eval.json", *(folder / "sae").rglob("*"), *(folder / "store").rglob("*")]
    return {path: path.read_bytes() for path in made if path.is_file()}


ON = ("run_dir=run", "device=cpu")
AGAIN = (*ON, *TRAIN, "out_dir=run/other")
CONVERT = ("convert", "run/sae", "theirs", "--to")
REFUSED: dict[str, tuple[str, Sequence[str], str]] = {
    "signed_topk": ("stage_train", [*AGAIN, "sae.activation=signed_topk"], "signed_topk is read for linear encoders"),
    "half a context": ("stage_train", [*AGAIN, "stream.batch_size=384"], "whole contexts, of 256 positions"),
    "no attention": ("stage_train", [*AGAIN, f"reads={WRITES}", f"writes={READS}"], "layers.N.attn_in"),
    "supervised": ("stage_eval", [*ON, "supervised=true"], "supervised=true draws single tokens"),
    "threshold": ("granary", [*CONVERT, "granary", "--threshold", "run/store"], "reads whole contexts"),
    "another format": ("granary", [*CONVERT, "saelens"], "has no lorsas"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(run: ForkServer, what: str) -> None:
    module, words, told = REFUSED[what]
    before = kept(run.folder / "run")
    assert told in run.run(module, *words).error
    assert kept(run.folder / "run") == before
    assert not (run.folder / "theirs").exists()
    assert not list((run.folder / "run/other").rglob("*.safetensors"))
