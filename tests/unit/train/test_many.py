"""Several runs on one stream: each ends as it would have alone, whatever happens to the others."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.parallel import World
from shared.sae import SAE, load_provenance
from shared.store import Store
from stage_train.job import Job
from stage_train.state.checkpoint import newest_checkpoint
from stage_train.step.trainer import Trainer

pytestmark = pytest.mark.usefixtures("train_configs")

HOOKS = ("layers.1.resid_post", "layers.2.resid_post")
WORLD = World(0, 1, 0, torch.device("cpu"))
TIMES = {"tokens_per_s", "wait_share"}
FIXED = [
    "sae.k=3", "sae.expansion=8", "stream.batch_size=16", "stream.lanes=4", "schedule.tokens=640",
    f"hook={HOOKS[0]}", "logger.progress=false", "logger.curves=false", "logger.every=5", "checkpoint.every=0",
    "sae.dead_after_tokens=40", "stream.seed=0",
]  # fmt: skip
MEMBERS = {
    "plain": [],
    "wide": ["sae.k=2", "sae.expansion=16", "optim.lr=0.003"],
    "seed": ["seed=1"],
    "other_hook": [f"hook={HOOKS[1]}"],
    "short": ["schedule.tokens=300", "optim=signum"],
    "batchtopk": ["sae=batchtopk", "sae.k=3", "optim.micro_batch=7"],
    "jumprelu": ["sae=jumprelu", "sae.k=null", "optim.ema_decay=0.9"],
    "half": ["optim.moments=bfloat16", "sae.multi_topk_weight=0.125"],
}


class Folder:
    """A store of two hooks, and runs beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cfg(self, name: str, *overrides: str) -> Any:
        paths = [f"out_dir={self.path / name}", f"store.url={self.path / 'store'}"]
        return OmegaConf.to_object(compose("train", overrides=[*FIXED, *paths, *overrides]))

    def alone(self, name: str, *overrides: str) -> Path:
        Job([self.cfg(name, *overrides)], WORLD).execute()
        return self.path / name

    def together(self, runs: dict[str, list[str]]) -> None:
        Job([self.cfg(name, *overrides) for name, overrides in runs.items()], WORLD).execute()

    def assert_same(self, one: str, two: str) -> None:
        """Bit for bit: weights, and all that was logged but times."""
        first, second = (SAE.from_pretrained(self.path / name).state_dict() for name in (one, two))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), (one, two)
        lines = [
            [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(self.path / name)]
            for name in (one, two)
        ]
        assert lines[0] == lines[1]


@pytest.fixture
def folder(tmp_path: Path, planted_store: Callable[..., Store]) -> Folder:
    planted_store(tmp_path / "store", hooks=HOOKS)
    return Folder(tmp_path)


def stop_in_step(step: int, name: str, monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    """SIGTERM while the run `name` learns for the `step`-th time."""
    original = Trainer.step
    sae_config = folder.cfg(name, *MEMBERS[name]).sae.to_config(12)

    def patched(self: Trainer, batch: Any) -> None:
        if self.progress.step == step - 1 and self.sae.config == sae_config:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch)

    monkeypatch.setattr(Trainer, "step", patched)


def test_each_run_is_as_if_alone(folder: Folder) -> None:
    for name, overrides in MEMBERS.items():
        folder.alone(f"alone_{name}", *overrides)
    folder.together(MEMBERS)
    for name in MEMBERS:
        folder.assert_same(f"alone_{name}", name)
    assert len({(folder.path / name / "sae.safetensors").read_bytes() for name in MEMBERS}) == len(MEMBERS)
    assert [read_metrics(folder.path / name)[-1]["step"] for name in ("plain", "short")] == [42, 20]


def test_the_store_is_read_once(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as by one run per hook, whatever their number."""
    reads: Counter[str] = Counter()
    original = Store.read_context

    def counting(self: Store, hook: str, context: int, *args: Any, **options: Any) -> torch.Tensor:
        reads[hook] += 1
        return original(self, hook, context, *args, **options)

    monkeypatch.setattr(Store, "read_context", counting)
    folder.alone("one")
    once = reads[HOOKS[0]]
    reads.clear()
    folder.together({"a": [], "b": ["sae.k=2"], "c": ["sae.k=1"], "d": [f"hook={HOOKS[1]}"]})
    assert reads == {HOOKS[0]: once, HOOKS[1]: once}


@pytest.mark.parametrize("step", [1, 17, 30])
def test_stopped_together_and_continued(folder: Folder, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them has ended already by then."""
    members = {name: MEMBERS[name] for name in ("plain", "wide", "short")}
    stop_in_step(step, "wide", monkeypatch, folder)
    with pytest.raises(SystemExit) as stopped:
        folder.together(members)
    assert stopped.value.code == 0
    monkeypatch.undo()
    assert {name: newest_checkpoint(folder.path / name / "checkpoints").name for name in members} == {  # type: ignore[union-attr]
        name: f"step-{min(step, 20 if name == 'short' else 42):08d}" for name in members
    }
    folder.together(members)
    for name, overrides in members.items():
        folder.alone(f"alone_{name}", *overrides)
        folder.assert_same(f"alone_{name}", name)


def test_runs_that_were_saved_at_different_steps_meet_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stopped at 9, one at 30, one done, one new: what a kill between two saves leaves, and more."""
    for name, step in (("plain", 9), ("wide", 30)):
        stop_in_step(step, name, monkeypatch, folder)
        with pytest.raises(SystemExit):
            folder.alone(name, *MEMBERS[name])
        monkeypatch.undo()
    folder.alone("short", *MEMBERS["short"])
    members = {name: MEMBERS[name] for name in ("plain", "wide", "short", "seed")}
    folder.together(members)
    for name, overrides in members.items():
        folder.alone(f"alone_{name}", *overrides)
        folder.assert_same(f"alone_{name}", name)
    before = {name: (folder.path / name / "sae.safetensors").stat().st_mtime_ns for name in members}
    folder.together(members)
    assert before == {name: (folder.path / name / "sae.safetensors").stat().st_mtime_ns for name in members}


def test_a_run_that_diverges_does_not_harm_the_others(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = SAE.losses

    def poisoned(self: SAE, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return losses(self, x * float("nan") if self.config.k == 2 else x, *args, **options)

    monkeypatch.setattr(SAE, "losses", poisoned)
    with pytest.raises(GranaryError, match=r"1 of 3 SAEs diverged \(bad\), see above: lower optim\.lr"):
        folder.together({"a": [], "bad": ["sae.k=2"], "b": ["seed=1"]})
    folder.alone("alone")
    folder.assert_same("alone", "a")
    assert (folder.path / "b/sae.safetensors").exists()
    assert not (folder.path / "bad/sae.safetensors").exists()


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (["stream.seed=null"], ["stream.seed=null", "seed=1"], r"seeds \[0, 1\] ask for several: give stream\.seed=0"),
        ([], ["stream.lanes=2"], r"stream\.lanes is 4 for one and 2 for another: give one value"),
        ([], ["parallel=latent"], r"parallel\.layout is ddp for one and latent for another"),
        ([], ["sae.k=200"], r"b: .*200"),
        ([], ["schedule.epochs=1"], r"b: give one of schedule\.tokens and schedule\.epochs"),
        ([], ["hook=layers.7.resid_post"], r"b: hook layers\.7\.resid_post is not in the store"),
        (
            ["stream.max_norm_multiple=2.0"],
            ["stream.max_norm_multiple=2.0", f"hook={HOOKS[1]}"],
            r"stream\.max_norm_multiple=2\.0 drops other tokens at layers\.1.* and at layers\.2",
        ),
    ],
)
def test_what_can_not_share_a_stream_is_refused(folder: Folder, one: list[str], two: list[str], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        folder.together({"a": one, "b": two})
    assert not (folder.path / "a/sae.safetensors").exists()


def test_two_runs_need_two_folders(folder: Folder) -> None:
    with pytest.raises(GranaryError, match="two of the packed runs have out_dir="):
        Job([folder.cfg("a"), folder.cfg("a", "sae.k=2")], WORLD)


def test_runs_begun_on_other_shards_are_refused(folder: Folder) -> None:
    hidden = folder.path / "store/manifest/00000001.json"
    text = hidden.read_bytes()
    hidden.unlink()
    folder.alone("early")
    hidden.write_bytes(text)
    folder.alone("late", "sae.k=2")
    with pytest.raises(GranaryError, match=r"early and .*late were begun on other shards.*without packed=true"):
        folder.together({"early": [], "late": ["sae.k=2"]})
    folder.together({"early": [], "new": ["sae.k=1"]})  # the new one keeps to the shards of the first
    shards = [load_provenance(folder.path / name)["stores"][0]["shards"] for name in ("early", "new", "late")]
    assert shards == [4, 4, 5]


def test_outliers_are_dropped_once_for_all(folder: Folder, planted_store: Callable[..., Store]) -> None:
    planted_store(folder.path / "spiked", hooks=HOOKS, outliers=3)
    drop = ["stream.max_norm_multiple=1.5", f"store.url={folder.path / 'spiked'}"]
    folder.together({"a": drop, "b": [*drop, "sae.k=2"]})
    folder.alone("alone", *drop, "sae.k=2")
    folder.assert_same("alone", "b")
