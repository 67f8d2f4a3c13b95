"""Several runs on one stream: each ends as it would have alone, whatever happens to the others."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import load_provenance
from shared.sae.learn.objective import Objective
from shared.store import Store
from stage_train.job import Job
from stage_train.state.checkpoint import newest_checkpoint
from tests.training import WORLD, Runs, assert_same_run, assert_same_weights, exit_code, signalled_in, watching

pytestmark = pytest.mark.usefixtures("train_configs")

HOOKS = ("layers.1.resid_post", "layers.2.resid_post")
FIXED = [f"hook={HOOKS[0]}", "stream.seed=0"]
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


@pytest.fixture
def runs(tmp_path: Path, planted_store: Callable[..., Store]) -> Runs:
    """Runs beside a store of two hooks."""
    planted_store(tmp_path / "store", hooks=HOOKS)
    return Runs(tmp_path, *FIXED)


def assert_same(runs: Runs, one: str, two: str) -> None:
    assert_same_run(runs.folder / one, runs.folder / two)


@pytest.mark.parametrize(
    "names",
    [("plain", "other_hook", "short", "batchtopk", "jumprelu"), pytest.param(tuple(MEMBERS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_each_run_is_as_if_alone(runs: Runs, names: tuple[str, ...]) -> None:
    for name in names:
        runs(f"alone_{name}", *MEMBERS[name])
    runs.together({name: MEMBERS[name] for name in names})
    for name in names:
        assert_same(runs, f"alone_{name}", name)
    assert len({(runs.folder / name / "sae.safetensors").read_bytes() for name in names}) == len(names)
    assert [read_metrics(runs.folder / name)[-1]["step"] for name in ("plain", "short")] == [42, 20]


def test_what_is_read_and_written_may_differ(runs: Runs) -> None:
    """An SAE, a transcoder and one the other way round, each as if alone; by sites in place of a hook, too."""
    there, back = (["variant=transcoder", "hook=null", f"reads={a}", f"writes={b}"] for a, b in (HOOKS, HOOKS[::-1]))
    members = {"sae": [], "by_reads": ["hook=null", f"reads={HOOKS[0]}"], "there": there, "back": back}
    for name, overrides in members.items():
        runs(f"alone_{name}", *overrides)
    runs.together(members)
    for name in members:
        assert_same(runs, f"alone_{name}", name)
    assert_same_weights(runs.folder / "sae", runs.folder / "by_reads")
    assert load_provenance(runs.folder / "there")["writes"] == [HOOKS[1]]


def test_the_store_is_read_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as by one run per hook, whatever their number."""
    reads: Counter[str] = Counter()
    original = Store.read_context

    def counting(self: Store, hook: str, context: int, *args: Any, **options: Any) -> torch.Tensor:
        reads[hook] += 1
        return original(self, hook, context, *args, **options)

    monkeypatch.setattr(Store, "read_context", counting)
    runs("one")
    once = reads[HOOKS[0]]
    reads.clear()
    runs.together({"a": [], "b": ["sae.k=2"], "c": ["sae.k=1"], "d": [f"hook={HOOKS[1]}"]})
    assert reads == {HOOKS[0]: once, HOOKS[1]: once}


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 17, pytest.param(30, marks=pytest.mark.slow)]
)
def test_stopped_together_and_continued(runs: Runs, step: int) -> None:
    """Also where one of them has ended already by then."""
    members = {name: MEMBERS[name] for name in ("plain", "wide", "short")}
    with watching(before=signalled_in(step, which="wide")):
        assert exit_code(lambda: runs.together(members)) == 143
    assert {name: newest_checkpoint(runs.folder / name / "checkpoints").name for name in members} == {  # type: ignore[union-attr]
        name: f"step-{min(step, 20 if name == 'short' else 42):08d}" for name in members
    }
    runs.together(members)
    for name, overrides in members.items():
        runs(f"alone_{name}", *overrides)
        assert_same(runs, f"alone_{name}", name)


@pytest.mark.slow
def test_runs_that_were_saved_at_different_steps_meet_again(runs: Runs) -> None:
    """One stopped at 9, one at 30, one done, one new: what a kill between two saves leaves, and more."""
    for name, step in (("plain", 9), ("wide", 30)):
        runs.stopped(name, *MEMBERS[name], step=step)
    runs("short", *MEMBERS["short"])
    members = {name: MEMBERS[name] for name in ("plain", "wide", "short", "seed")}
    runs.together(members)
    for name, overrides in members.items():
        runs(f"alone_{name}", *overrides)
        assert_same(runs, f"alone_{name}", name)
    before = {name: (runs.folder / name / "sae.safetensors").stat().st_mtime_ns for name in members}
    runs.together(members)
    assert before == {name: (runs.folder / name / "sae.safetensors").stat().st_mtime_ns for name in members}


def test_a_run_that_diverges_does_not_harm_the_others(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Objective.losses

    def poisoned(self: Objective, x: torch.Tensor, *args: Any) -> Any:
        return losses(self, x * float("nan") if self.dictionary.config.k == 2 else x, *args)

    monkeypatch.setattr(Objective, "losses", poisoned)
    with pytest.raises(GranaryError, match=r"1 of 3 SAEs diverged \(bad\), see above: lower optim\.lr"):
        runs.together({"a": [], "bad": ["sae.k=2"], "b": ["seed=1"]})
    runs("alone")
    assert_same(runs, "alone", "a")
    assert (runs.folder / "b/sae.safetensors").exists()
    assert not (runs.folder / "bad/sae.safetensors").exists()


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
def test_what_can_not_share_a_stream_is_refused(runs: Runs, one: list[str], two: list[str], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        runs.together({"a": one, "b": two})
    assert not (runs.folder / "a/sae.safetensors").exists()


def test_two_runs_need_two_folders(runs: Runs) -> None:
    with pytest.raises(GranaryError, match="two of the packed runs have out_dir="):
        Job([runs.cfg("a"), runs.cfg("a", "sae.k=2")], WORLD)


def test_runs_begun_on_other_shards_are_refused(runs: Runs) -> None:
    hidden = runs.folder / "store/manifest/00000001.json"
    text = hidden.read_bytes()
    hidden.unlink()
    runs("early")
    hidden.write_bytes(text)
    runs("late", "sae.k=2")
    with pytest.raises(GranaryError, match=r"early and .*late were begun on other shards.*without packed=true"):
        runs.together({"early": [], "late": ["sae.k=2"]})
    runs.together({"early": [], "new": ["sae.k=1"]})  # the new one keeps to the shards of the first
    shards = [load_provenance(runs.folder / name)["stores"][0]["shards"] for name in ("early", "new", "late")]
    assert shards == [4, 4, 5]


def test_outliers_are_dropped_once_for_all(runs: Runs, planted_store: Callable[..., Store]) -> None:
    planted_store(runs.folder / "spiked", hooks=HOOKS, outliers=3)
    drop = ["stream.max_norm_multiple=1.5", f"store.url={runs.folder / 'spiked'}"]
    runs.together({"a": drop, "b": [*drop, "sae.k=2"]})
    runs("alone", *drop, "sae.k=2")
    assert_same(runs, "alone", "b")
