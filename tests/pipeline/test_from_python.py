"""The stages called from Python: what they return, what they refuse, and that they make what the command lines make."""

from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest

import granary
from granary import GranaryError
from shared.launch.compose import as_overrides
from tests.cli import ForkServer

HARVEST = {"debug": "tiny_harvest", "corpus.contexts": 12, "tokenise_workers": 0, "device.name": "cpu"}
TRAIN = {"debug": "tiny_train", "schedule.tokens": "2_000", "device": {"name": "cpu"}}


class Colour(Enum):
    red = "crimson"


def test_settings_are_written_as_a_command_line_would() -> None:
    given = {
        "name": "a b",
        "sae": {"k": 32, "d_latent": None},
        "optim.lr": 1e-4,
        "joint": True,
        "store": {"others": ["a", "s3://b/${c}"]},
        "path": Path("/x"),
        "kind": Colour.red,
    }
    assert list(as_overrides(given)) == [
        'name="a b"',
        "sae.k=32",
        "sae.d_latent=null",
        "optim.lr=0.0001",
        "joint=true",
        'store.others=[a,"s3://b/\\${c}"]',
        "path=/x",
        "kind=crimson",
    ]
    with pytest.raises(GranaryError, match=r"sae.k=<object .*: give a text, a number"):
        list(as_overrides({"sae": {"k": object()}}))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a store and an SAE, both made from Python."""
    folder = tmp_path_factory.mktemp("python")
    store = granary.harvest(run_dir=folder / "run", **HARVEST)
    assert (store.url, store.num_contexts, store.complete) == (str(folder / "run/store"), 12, True)
    sae = granary.train("sae.k=4", run_dir=folder / "run", **TRAIN)
    assert isinstance(sae, granary.SAE)
    assert sae.config.k == 4
    return folder


def test_a_scored_sae_returns_what_its_file_says(study: Path) -> None:
    (scores,) = granary.evaluate(run_dir=study / "run", downstream=False, device={"name": "cpu"})
    assert 0 < scores.fvu < 1
    assert scores.l0 == pytest.approx(4)
    assert (study / "run/eval.json").is_file()
    latents = granary.inspect("contexts=2", run_dir=study / "run", **{"device.name": "cpu"})
    assert latents.num_latents == granary.load(study / "run/sae").config.d_latent


def test_the_command_line_makes_the_same_weights(study: Path, stages: ForkServer) -> None:
    here = stages.at(study)
    again = here.run(
        "granary", "train", "run_dir=run", "out_dir=again", "sae.k=4", "debug=tiny_train", "schedule.tokens=2_000"
    )
    assert again.code == 0, again.stderr
    assert (study / "again/sae.safetensors").read_bytes() == (study / "run/sae/sae.safetensors").read_bytes()


def test_a_configuration_is_changed_and_several_learn_from_one_pass(study: Path) -> None:
    first = granary.configure("train", "sae.k=2", run_dir=study / "run", sae_name="two", **TRAIN)
    second = replace(first, out_dir=str(study / "run/eight"), sae=replace(first.sae, k=8))
    made = granary.train_together([first, second])
    assert [one.config.k for one in made] == [2, 8]
    assert granary.train(second).config.k == 8  # which is there
    with pytest.raises(GranaryError, match="two configurations have one out_dir"):
        granary.train_together([first, first])
    with pytest.raises(GranaryError, match=r"seed: change the configuration itself"):
        granary.train(first, seed=1)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: granary.train(sae={"kk": 3}), "unknown configuration key 'sae.kk'"),
        (lambda: granary.train("sae=topp"), "no option 'topp' in group 'sae'"),
        (lambda: granary.train("sae.k=4,8"), "sae.k=4,8 is a sweep"),
        (lambda: granary.train(packed=True), "packed=true makes nothing that could be returned"),
        (lambda: granary.harvest(dry_run=True), "dry_run=true makes nothing that could be returned"),
        (lambda: granary.configure("trian"), "there is no stage 'trian': choose from harvest"),
        (lambda: granary.train_together([]), "train_together needs at least one configuration"),
        (lambda: granary.train(replace(granary.configure("train"), nproc=2)), "nproc=2 starts processes from keys"),
    ],
)
def test_a_wrong_input_is_one_line(call: object, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GranaryError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(line)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_processes_return_the_same_and_their_error_is_told(study: Path) -> None:
    one = granary.evaluate(run_dir=study / "run", downstream=False, **{"device.name": "cpu"})
    two = granary.evaluate(run_dir=study / "run", downstream=False, nproc=2, **{"device.name": "cpu"})
    assert two[0].fvu == pytest.approx(one[0].fvu, rel=1e-9)
    with pytest.raises(GranaryError, match="nowhere"):
        granary.evaluate("sae=nowhere", run_dir=study / "run", nproc=2)
