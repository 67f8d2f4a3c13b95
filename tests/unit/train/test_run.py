"""Training runs in one process: exact resume, what is refused, what is left on disk."""

import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.kernels import linear
from shared.sae import load_provenance
from shared.sae.folder import describe
from shared.sae.learn import dead
from shared.sae.learn.objective import Objective
from shared.store import Store
from stage_train.state.checkpoint import newest_checkpoint
from stage_train.state.export import export
from stage_train.state.tensor_files import TensorWriter
from stage_train.step import schedule
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import Runs, assert_same_run, assert_same_weights, watching, weights

pytestmark = pytest.mark.usefixtures("train_configs")

HOOK, T = "layers.1.resid_post", 16


@pytest.mark.parametrize("length", ["schedule.tokens=640", "schedule.epochs=2"])
def test_dead_latents_are_a_share_of_the_run(train: Runs, length: str) -> None:
    tokens = "schedule.tokens=null" if "epochs" in length else length
    out = train("a", "sae.dead_after_tokens=auto", tokens, length)
    assert describe(out).training["dead_after_tokens"] == read_metrics(out)[-1]["tokens"] // 20


def test_a_run_learns_and_leaves_what_it_promises(train: Runs) -> None:
    out = train("a", "schedule.tokens=4_000", "optim.lr=0.02", "logger.curves=true")
    lines = read_metrics(out)
    assert [line["step"] for line in lines[:-1]] == [5 * i for i in range(1, len(lines))]
    assert lines[-1]["fvu"] < 0.6 * lines[0]["fvu"]
    keys = {"loss", "reconstruction", "fvu", "l0", "dead_fraction", "lr", "grad_norm", "tokens_per_s", "wait_share"}
    assert keys <= lines[0].keys()
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "sae.safetensors",
        "train.yaml",
    ]
    record = load_provenance(out)
    assert record["hook"] == HOOK
    assert record["tokens"] == lines[-1]["tokens"] >= 4_000
    assert record["model"] == {"id": "planted"}
    assert OmegaConf.load(out / "train.yaml").sae.k == 3


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 13, 39])
def test_stopped_and_resumed_equals_uninterrupted(train: Runs, straight: Callable[[], Path], stop: int) -> None:
    """Bit for bit, weights and metrics, across an epoch's end and with dead latents in play."""
    whole = straight()
    assert max(line["epoch"] for line in read_metrics(whole)) >= 1
    assert any(line["auxk"] > 0 for line in read_metrics(whole))
    parts = train.stopped("parts", step=stop)
    assert not (parts / "sae.safetensors").exists()
    train("parts")
    assert_same_run(whole, parts)


@pytest.mark.parametrize("stop", [16, pytest.param(23, marks=pytest.mark.slow)])
def test_resumed_where_dead_latents_take_turns(
    train: Runs, straight: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """One at a time, as where they are too many for AuxK's memory: not what all together give, and as repeatable."""
    all_together = straight()
    monkeypatch.setattr(dead, "DEAD_ELEMENTS", 1)
    in_turns = train("turns")
    assert not torch.equal(weights(all_together)["W_enc"], weights(in_turns)["W_enc"])
    train.stopped("parts", step=stop)
    assert_same_weights(in_turns, train("parts"))


def test_metrics_after_the_checkpoint_are_not_repeated(train: Runs) -> None:
    out = train.stopped("a", step=13)
    with (out / "metrics.jsonl").open("a") as file:  # a run that was killed at step 20, saved at 13
        file.write(json.dumps({"step": 20, "fvu": 9.0}) + "\n" + '{"step": 25, "f')
    train("a")
    assert [line["step"] for line in read_metrics(out)] == [*range(5, 41, 5), 42]
    assert all(line["fvu"] < 9 for line in read_metrics(out))


def test_a_finished_run_is_left_alone(train: Runs) -> None:
    out = train("a")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in ("train.yaml", "latest")}
    train("a")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_without_its_export_gets_it(train: Runs) -> None:
    out = train("a")
    expected = weights(out)
    (out / "sae.safetensors").unlink()
    train("a")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())


def test_another_configuration_is_refused_by_name(train: Runs) -> None:
    train.stopped("a", step=5)
    with pytest.raises(
        GranaryError, match=r"optim\.lr was .*, is 0\.5; sae\.k was 3, is 4\. Use the same, give this one"
    ):
        train("a", "optim.lr=0.5", "sae.k=4")
    train("a", "logger.every=10", "checkpoint.every=7", "stream.io_threads=2", "stream.prefetch_gib=0")


def test_a_run_from_before_a_key_goes_on_as_it_was(train: Runs) -> None:
    """AuxK had no slope then, and no key for one: by default a wide dictionary has one now, and others have none."""
    plain, wide = "sae.auxk_slope=0", "sae.expansion=64"
    train.stopped("narrow", plain, step=5)
    assert_same_weights(train("narrow"), train("plain", plain))
    train.stopped("wide", plain, wide, step=5)
    with pytest.raises(GranaryError, match=r"sae\.auxk_slope was 0\.0, is 0\.3"):
        train("wide", wide)
    assert_same_weights(train("wide", plain, wide), train("wide plain", plain, wide))


def test_what_auto_stands_for_is_compared_where_only_the_store_tells(train: Runs) -> None:
    """A number of latents says nothing of their number per dimension."""
    wide = "sae.d_latent=2048"
    train.stopped("a", "sae.auxk_slope=0", wide, step=5)
    with pytest.raises(GranaryError, match=r"slope at 0\.0, not 0\.3: continue it with sae\.auxk_slope=0\.0"):
        train("a", wide)
    train.stopped("b", wide, step=5)
    assert_same_weights(train("b", wide), train("c", wide))


def test_a_long_run_goes_on_at_the_rate_it_was_begun_with(train: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the rate went by the width alone; in short runs it still does."""
    older, younger = "optim.lr=by_width", "optim.lr=by_width_and_length"
    train.stopped("short", older, step=5)
    assert_same_weights(train("short", younger), train("by width", older))
    monkeypatch.setattr(schedule, "LONG", 2)
    train.stopped("long", older, step=5)
    with pytest.raises(GranaryError, match=r"rate peaks at .*, not .*: continue it with optim\.lr=by_width, or begin"):
        train("long", younger)
    train.stopped("slow", younger, step=5)
    with pytest.raises(GranaryError, match=r"continue it with optim\.lr=by_width_and_length, or begin"):
        train("slow", older)
    assert_same_weights(train("long", older), train("by width", older))
    slow, fast = (read_metrics(out)[0]["lr"] for out in (train("slow", younger), train("long", older)))
    assert slow < 0.9 * fast


def test_resume_never_and_must(train: Runs) -> None:
    with pytest.raises(GranaryError, match="no checkpoint in"):
        train("a", "checkpoint.resume=must")
    train.stopped("a", step=5)
    train.stopped("a", "checkpoint.resume=must", step=9)
    train("a", "checkpoint.resume=never", "sae.k=2")
    train("b", "sae.k=2")
    assert_same_weights(train("a", "sae.k=2"), train("b", "sae.k=2"))


def test_nothing_is_discarded_before_everything_is_checked(train: Runs) -> None:
    out = train.stopped("a", step=5)
    before = {path: path.read_bytes() for path in files_of_state(out)}
    for wrong in (
        "hook=layers.9.resid_post", "store.url=/nowhere", "sae.k=500", "schedule.epochs=1", "optim.lr=fast",
        "optim.ema_export=true", "stream.batch_size=100_000", "schedule.warmup=1000", "compute.dtype=float8",
    ):  # fmt: skip
        with pytest.raises(GranaryError):
            train("a", "checkpoint.resume=never", "stream.drop_last=true", wrong)
        assert {path: path.read_bytes() for path in files_of_state(out)} == before, wrong
    assert [line["step"] for line in read_metrics(train("a", "checkpoint.resume=must"))] == [*range(5, 41, 5), 42]


def test_the_discarded_run_is_kept_until_its_successor_is_on_disk(train: Runs, tmp_path: Path) -> None:
    """A successor that is killed before its first checkpoint leaves all that was there, under another name."""
    train.stopped("a", step=5)
    before = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in files_of_state(tmp_path / "a")}
    train.killed("a", "checkpoint.resume=never", "seed=1", step=3)
    aside = tmp_path / "a/discarded"
    assert {path.relative_to(aside): path.read_bytes() for path in files_of_state(aside)} == before
    out = train("a", "checkpoint.resume=never", "seed=1")
    assert not aside.exists()
    assert_same_run(out, train("b", "seed=1"))


def files_of_state(folder: Path) -> list[Path]:
    """Checkpoints and metrics."""
    return [*(path for path in (folder / "checkpoints").rglob("*") if path.is_file()), folder / "metrics.jsonl"]


def test_an_older_export_in_the_folder_is_replaced(train: Runs, straight: Callable[[], Path]) -> None:
    """Of a run that is discarded, and of one that was exported on its way."""
    train("a", "seed=1")
    train("a", "checkpoint.resume=never")
    assert_same_weights(straight(), train("a"))
    out = train.stopped("b", step=13)
    newest = newest_checkpoint(out / "checkpoints")
    assert newest is not None
    export(newest, out)
    assert_same_weights(straight(), train("b"))


def test_a_store_that_grows_does_not_change_a_run(train: Runs, tmp_path: Path) -> None:
    """Training begins on a store half made, and keeps to what it saw then."""
    whole, store = Store.open(tmp_path / "store"), tmp_path / "store"
    hidden = [store / f"manifest/{shard:08d}.json" for shard in (1, 3)]
    texts = [path.read_bytes() for path in hidden]
    [path.unlink() for path in hidden]
    straight = train("straight")
    train.stopped("parts", step=7)
    [path.write_bytes(text) for path, text in zip(hidden, texts, strict=True)]
    assert len(whole.committed()) == 6
    assert_same_weights(straight, train("parts"))
    assert load_provenance(straight)["stores"][0]["shards"] == 3
    hidden[0].with_name("00000000.json").unlink()
    train.stopped("more", step=3)
    with pytest.raises(GranaryError, match=r"shard 0 of .* is gone"):
        train("parts", "checkpoint.resume=must")


def test_another_store_in_the_same_place_is_refused(
    train: Runs, tmp_path: Path, planted_store: Callable[..., Store]
) -> None:
    train.stopped("a", step=3)
    (tmp_path / "store").rename(tmp_path / "first")
    planted_store(tmp_path / "store", seed=1)
    with pytest.raises(GranaryError, match="does not hold the activations that this run began with"):
        train("a")
    train("a", f"store.url={tmp_path / 'first'}")  # moved: known by its digest


def test_held_out_shards_are_never_read(train: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    original = Store.read_context

    def recording(self: Store, hook: str, context: int, *args: Any, **options: Any) -> torch.Tensor:
        read.add(context)
        return original(self, hook, context, *args, **options)

    monkeypatch.setattr(Store, "read_context", recording)
    train("a")
    assert read == set(range(20))


def test_the_result_does_not_depend_on_micro_batches(train: Runs) -> None:
    whole, parts = weights(train("whole")), weights(train("parts", "optim.micro_batch=5"))
    for name, tensor in whole.items():
        assert_close_in_norm(parts[name], tensor, SAME_RUN, f"{name} after the same batches, {REORDERED}")


def test_several_stores_are_read_as_one(train: Runs, tmp_path: Path, planted_store: Callable[..., Store]) -> None:
    planted_store(tmp_path / "other", shards=3, seed=5)
    out = train(
        "a", f"store.others=[{{url:{tmp_path / 'other'},weight:0.5}}]", "schedule.tokens=null", "schedule.epochs=2"
    )
    record = load_provenance(out)
    assert [part["weight"] for part in record["stores"]] == [1.0, 0.5]
    assert read_metrics(out)[-1]["epoch"] == 1


def test_divergence_is_one_line_and_the_last_checkpoint_stays(train: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train.stopped("a", step=3)
    losses = Objective.losses

    def poisoned(self: Objective, x: torch.Tensor, *args: Any) -> Any:
        return losses(self, x * float("nan"), *args)

    monkeypatch.setattr(Objective, "losses", poisoned)
    with pytest.raises(GranaryError, match=r"diverged by step 5 \(loss nan.*lower optim\.lr"):
        train("a")
    with pytest.raises(GranaryError, match=r"diverged by step 4 \(loss"):
        train("a", "checkpoint.every=4", "logger.every=1000")
    assert (out / "checkpoints/latest").read_text() == "step-00000003"


def test_only_the_newest_checkpoints_are_kept(train: Runs) -> None:
    out = train("a", "checkpoint.every=8", "checkpoint.keep=2")
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000040", "step-00000042"]
    with pytest.raises(GranaryError, match=r"checkpoint\.keep=0"):
        train("b", "checkpoint.keep=0")


def test_a_checkpoint_torn_while_being_written_is_ignored(train: Runs, straight: Callable[[], Path]) -> None:
    """What a kill leaves half-written has another name; the pointer still names the one before."""
    out = train.stopped("a", step=9)
    partial = out / "checkpoints/step-00000020.partial"
    partial.mkdir()
    (partial / "tensors-00000.safetensors").write_bytes(b"torn")
    train("a")
    assert_same_weights(straight(), out)
    assert not partial.exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line(train: Runs, straight: Callable[[], Path]) -> None:
    """As on a full disk: no file may grow beyond 8 KiB. The checkpoint before stays, and the run goes on from it."""
    out = train.stopped("a", step=9)
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
    try:
        with pytest.raises(
            GranaryError, match=r"could not be written \(.*File too large.*\): is there room\?"
        ) as caught:
            train("a", "checkpoint.every=5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (out / "checkpoints/latest").read_text() == "step-00000009"
    assert_same_weights(straight(), train("a"))


def test_training_goes_on_while_a_checkpoint_is_written(
    train: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits for a later step, and writes the weights of the step that was saved."""
    stopped = train.stopped("stopped", step=10)
    later, write = threading.Event(), TensorWriter.write_data

    def waiting(self: TensorWriter, *args: Any) -> Any:
        assert later.wait(timeout=60)
        return write(self, *args)

    def after(run: Any) -> None:
        if run.step == 15:
            assert newest_checkpoint(tmp_path / "a/checkpoints") is None
            later.set()

    monkeypatch.setattr(TensorWriter, "write_data", waiting)
    with watching(after=after):
        out = train("a", "checkpoint.every=10", "checkpoint.keep=9")
    for folder in (out, stopped):
        export(folder / "checkpoints/step-00000010", folder / "ten")
    assert_same_weights(out / "ten", stopped / "ten")
    assert not torch.equal(weights(out)["W_enc"], weights(out / "ten")["W_enc"])


def test_hooks_are_chosen_or_listed(train: Runs, tmp_path: Path, planted_store: Callable[..., Store]) -> None:
    two = tmp_path / "two"
    planted_store(two, hooks=(HOOK, "layers.2.resid_post"))
    with pytest.raises(GranaryError, match=r"several hooks: choose hook=layers\.1\.resid_post \| layers\.2"):
        train("a", f"store.url={two}")
    out = train("a", f"store.url={two}", "hook=layers.2.resid_post")
    assert load_provenance(out)["hook"] == "layers.2.resid_post"


def test_length_is_tokens_or_epochs(train: Runs) -> None:
    with pytest.raises(GranaryError, match=r"one of schedule\.tokens and schedule\.epochs"):
        train("a", "schedule.epochs=1")
    out = train("a", "schedule.tokens=null", "schedule.epochs=1.5")
    per_epoch = read_metrics(out)[-1]["tokens"] / 1.5
    assert per_epoch == pytest.approx(20 * T * 0.9, rel=0.1)


def test_kernels_of_the_configuration_give_the_same_curve(train: Runs) -> None:
    auto, reference = (read_metrics(train(name, f"compute.kernels={name}")) for name in ("auto", "reference"))
    for one, other in zip(auto, reference, strict=True):
        assert one["reconstruction"] == pytest.approx(other["reconstruction"], rel=1e-3)


def test_bfloat16_on_a_processor_without_its_instructions_is_float32_and_says_so(
    train: Runs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "FAST_BFLOAT16", False)
    asked, plain = train("asked", "compute.dtype=bfloat16"), train("plain", "compute.dtype=float32")
    said = [record.message for record in caplog.records if "compute.dtype" in record.message]
    assert len(said) == 1
    assert "float32, which is used instead" in said[0]
    assert OmegaConf.load(asked / "train.yaml").compute.dtype == "float32"
    assert_same_run(asked, plain)


def test_kernels_that_cannot_run_here_are_refused(train: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(GranaryError, match=r"compute\.kernels=triton needs CUDA"):
        train("triton", "compute.kernels=triton")
    with pytest.raises(GranaryError, match="compute_dtype='float8'"):
        train("float8", "compute.dtype=float8")
