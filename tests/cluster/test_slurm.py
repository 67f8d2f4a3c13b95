"""The stages as jobs of a real Slurm: run to the end, warned, pre-empted, cancelled, failed.

The cluster is the one of tests/servers/slurm_up.sh: two nodes, and a partition `urgent` whose jobs pre-empt the others.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.store import Store
from tests.cli import REPOSITORY
from tests.harvesting import ENVIRONMENT, same_files
from tests.inspection import content

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=20"]
TINY = ["debug=tiny_harvest", "device.threads=1"]
# Slow enough to be interrupted, fast enough to wait for.
SLOW = ["debug=tiny_harvest", "device.threads=1", "name=slow", "corpus.contexts=160", "packing.seq_len=1024"]
# More than a minute of work.
LONG = ["debug=tiny_harvest", "device.threads=1", "name=long", "corpus.contexts=2500", "packing.seq_len=1024",
        "store.shard_contexts=16"]  # fmt: skip
LONG_TRAINING = [
    "name=debug",
    "stream.batch_size=1024",
    "schedule.tokens=600_000",
    "sae.expansion=32",
    "logger.every=10",
    "checkpoint.every=100000",  # none but the one of the signal
    "device.threads=1",
]


CURVES = "runs/debug/sweep/*/metrics.jsonl"


def command(stage: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"stage_{stage}", *arguments]


def run(folder: Path, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(stage, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )


def submit(folder: Path, stage: str, *arguments: str) -> "subprocess.Popen[str]":
    """The command that submits and waits, left running."""
    with (folder / "submitted.log").open("w") as log:
        return subprocess.Popen(
            command(stage, *LAUNCHER, *arguments), cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, text=True
        )


def wait_for(what: Callable[[], object], seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s in vain; the queue: {slurm('squeue')}")


def slurm(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60).stdout


def jobs(name: str) -> list[str]:
    return slurm("squeue", "-h", "-n", f"granary-{name}", "-o", "%i").split()


def log_of(folder: Path) -> str:
    """What the jobs under `folder` wrote."""
    return "".join(path.read_text() for path in sorted(folder.glob("**/slurm/*/*_log.err")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a harvest made without Slurm."""
    folder = tmp_path_factory.mktemp("cluster")
    done = run(folder, "harvest", *TINY, "store.url=runs/debug/store")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def slow_store(folder: Path) -> Path:
    """What the slow harvest writes when nobody disturbs it."""
    done = run(folder, "harvest", *SLOW, "store.url=undisturbed")
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


def manifests(folder: Path, store: str) -> int:
    return len(list((folder / store / "manifest").glob("*.json")))


def test_a_harvest_over_two_nodes(folder: Path) -> None:
    done = run(folder, "harvest", *LAUNCHER, *TINY, "hydra.launcher.nodes=2", "nproc=1", "store.url=nodes")
    assert done.returncode == 0, done.stderr + log_of(folder)
    logs = [path.name.split("_", 1)[1] for path in folder.glob("runs/debug/harvest/slurm/*/*_log.err")]
    assert sorted(logs) == ["0_log.err", "1_log.err"]  # a supervisor on each node
    assert log_of(folder / "runs/debug/harvest").count("harvested") == 1
    same_files(folder / "runs/debug/store", folder / "nodes")


def test_a_sweep_of_training_jobs_and_their_evaluation(folder: Path) -> None:
    done = run(folder, "train", *LAUNCHER, "debug=tiny_train", "sae.k=4,8", "seed=0,1", "nproc=2")
    assert done.returncode == 0, done.stderr + log_of(folder)
    made = "runs/debug/sweep/*seed=*/sae.safetensors"  # another test trains into the folder too
    saes = sorted(folder.glob(made))
    assert len(saes) == 4
    # The same sweep again finds its runs finished.
    again = run(folder, "train", *LAUNCHER, "debug=tiny_train", "sae.k=4,8", "seed=0,1", "nproc=2")
    assert again.returncode == 0, again.stderr
    assert sorted(folder.glob(made)) == saes
    done = run(folder, "eval", *LAUNCHER, "name=debug", f"sae.path={saes[0].parent}", "downstream=false")
    assert done.returncode == 0, done.stderr + log_of(folder)
    assert (saes[0].parent / "eval.json").is_file()


def test_a_preempted_training_goes_on_and_ends_as_if_undisturbed(folder: Path) -> None:
    waiting = submit(folder, "train", *LONG_TRAINING)
    run_folder = wait_for(lambda: next((path.parent for path in folder.glob(CURVES) if "expansion" in str(path)), None))
    assert isinstance(run_folder, Path)
    wait_for(lambda: (run_folder / "metrics.jsonl").stat().st_size > 0)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 5", "--output=/dev/null"]
    assert subprocess.run(urgent, cwd=folder, capture_output=True).returncode == 0
    assert waiting.wait(timeout=280) == 0, (folder / "submitted.log").read_text()
    log = log_of(folder / "runs/debug/sweep")
    assert "stopped by SIGTERM after step" in log, log
    assert re.search(r"continuing from step [1-9]\d* of", log), log
    alone = run(folder, "train", *LONG_TRAINING, "out_dir=alone")
    assert alone.returncode == 0, alone.stderr
    assert (folder / "alone/sae.safetensors").read_bytes() == (run_folder / "sae.safetensors").read_bytes()


def test_a_warned_harvest_is_queued_again_and_goes_on(folder: Path, slow_store: Path) -> None:
    """The signal that Slurm sends before the time limit."""
    waiting = submit(folder, "harvest", *SLOW, "store.url=warned", "nproc=2")
    wait_for(lambda: manifests(folder, "warned") >= 2)
    (job,) = jobs("harvest")
    slurm("scancel", "--signal=USR1", job)
    assert waiting.wait(timeout=280) == 0, (folder / "submitted.log").read_text()
    log = log_of(folder / "runs/slow/harvest")
    assert re.search(r"resuming +\d+ contexts are in the store already", log), log
    same_files(slow_store, folder / "warned")


def test_a_harvest_that_reaches_its_time_limit_goes_on_until_it_is_done(folder: Path) -> None:
    """Nothing is signalled by this test: Slurm itself warns the job, one minute at a time."""
    limit = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=5"]
    done = subprocess.run(
        command("harvest", *limit, *LONG, "store.url=limited"),
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    log = log_of(folder / "runs/long/harvest")
    assert done.returncode == 0, done.stderr + log
    restarts = len(re.findall(r"resuming +[\d,]+ contexts are in the store already", log))
    assert restarts >= 1, log
    assert log.count("harvested") == 1
    store = Store.open(folder / "limited")
    assert store.complete
    assert store.num_shards == len(store.committed())


def test_a_cancelled_harvest_stays_cancelled_and_the_same_command_finishes_it(folder: Path, slow_store: Path) -> None:
    waiting = submit(folder, "harvest", *SLOW, "store.url=cancelled")
    wait_for(lambda: manifests(folder, "cancelled") >= 2)
    (job,) = jobs("harvest")
    slurm("scancel", job)
    assert waiting.wait(timeout=60) == 2
    last = (folder / "submitted.log").read_text().splitlines()[-1]
    assert re.fullmatch(r"error: Slurm job \d+(_\d+)? was cancelled; the same command again goes on from there", last)
    done = Store.open(folder / "cancelled").committed()
    assert 0 < len(done) < Store.open(folder / "cancelled").num_shards
    rerun = run(folder, "harvest", *LAUNCHER, *SLOW, "store.url=cancelled")
    assert rerun.returncode == 0, rerun.stderr
    same_files(slow_store, folder / "cancelled")


def test_one_training_of_a_sweep_is_cancelled_and_the_same_command_finishes_it(folder: Path) -> None:
    sweep = [*LONG_TRAINING, "name=two", "store.url=runs/debug/store", "seed=3,4"]
    waiting = submit(folder, "train", *sweep)
    curves = wait_for(lambda: len(found := sorted(folder.glob("runs/two/sweep/*/metrics.jsonl"))) == 2 and found)
    assert isinstance(curves, list)
    wait_for(lambda: all(path.stat().st_size for path in curves))
    slurm("scancel", next(job for job in jobs("train") if job.endswith("_1")))
    assert waiting.wait(timeout=280) == 2
    last = (folder / "submitted.log").read_text().splitlines()[-1]
    assert re.fullmatch(r"error: Slurm job \d+_1 was cancelled; the same command again goes on from there", last)
    whole, cut = (path.parent for path in curves)
    assert (whole / "sae.safetensors").is_file()  # the other was left alone
    assert not (cut / "sae.safetensors").exists()
    done = run(folder, "train", *LAUNCHER, *sweep)
    log = log_of(folder / "runs/two/sweep")
    assert done.returncode == 0, done.stderr + log
    assert re.search(r"continuing from step [1-9]\d* of", log), log
    alone = run(folder, "train", *LONG_TRAINING, "seed=4", "out_dir=alone4")
    assert alone.returncode == 0, alone.stderr
    assert (folder / "alone4/sae.safetensors").read_bytes() == (cut / "sae.safetensors").read_bytes()


def test_an_inspection_over_two_nodes(folder: Path) -> None:
    """Each node does one of two parts; the folder is that of one process, byte for byte."""
    parts = ["debug=tiny_harvest", "name=parts", "corpus.contexts=320", "packing.seq_len=1024"]
    made = run(folder, "harvest", *parts, "device.threads=1")
    assert made.returncode == 0, made.stderr
    made = run(folder, "train", "debug=tiny_train", "name=parts", "device.threads=1")
    assert made.returncode == 0, made.stderr
    inspected = ["name=parts", "device.threads=1"]
    nodes = [*LAUNCHER, *inspected, "hydra.launcher.nodes=2", "nproc=1", "latents.url=inspected_by_nodes"]
    done = run(folder, "inspect", *nodes)
    assert done.returncode == 0, done.stderr + log_of(folder)
    log = log_of(folder / "runs/parts/inspect")
    assert re.search(r"parts +2,", log), log
    assert len(re.findall(r"inspected [\d,]+ tokens", log)) == 1, log
    again = run(folder, "inspect", *nodes)
    assert again.returncode == 0, again.stderr
    assert "is finished already" in log_of(folder / "runs/parts/inspect")
    alone = run(folder, "inspect", *inspected, "latents.url=inspected_alone")
    assert alone.returncode == 0, alone.stderr
    assert content(folder / "inspected_by_nodes") == content(folder / "inspected_alone")


def test_a_cancelled_inspection_stays_cancelled_and_the_same_command_finishes_it(
    folder: Path, slow_store: Path
) -> None:
    """Its finished parts are kept; the folder is whole only with its last file."""
    done = run(folder, "train", "debug=tiny_train", f"store.url={slow_store}", "out_dir=cancel_sae", "device.threads=1")
    assert done.returncode == 0, done.stderr
    inspected = ["name=slow", "sae.path=cancel_sae", f"store.url={slow_store}", "device.threads=1"]
    waiting = submit(folder, "inspect", *inspected, "latents.url=cancelled_latents")
    wait_for(lambda: (folder / "cancelled_latents").is_dir() and jobs("inspect"))
    (job,) = jobs("inspect")
    slurm("scancel", job)
    assert waiting.wait(timeout=60) == 2
    last = (folder / "submitted.log").read_text().splitlines()[-1]
    assert re.fullmatch(r"error: Slurm job \d+(_\d+)? was cancelled; the same command again goes on from there", last)
    assert not (folder / "cancelled_latents/meta.json").exists()
    rerun = run(folder, "inspect", *LAUNCHER, *inspected, "latents.url=cancelled_latents")
    assert rerun.returncode == 0, rerun.stderr + log_of(folder / "runs/slow/inspect")
    alone = run(folder, "inspect", *inspected, "latents.url=undisturbed_latents")
    assert alone.returncode == 0, alone.stderr
    assert content(folder / "cancelled_latents") == content(folder / "undisturbed_latents")


def test_a_job_that_fails_is_one_line(folder: Path) -> None:
    done = run(folder, "harvest", *LAUNCHER, *TINY, "model=./nowhere", "store.url=refused")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: Slurm job \d+(_\d+)? failed: no model folder at \./nowhere", last), done.stderr
    assert "Traceback" not in done.stderr


def test_the_batch_script_keeps_spaces_and_goes_on_after_the_warning(folder: Path, slow_store: Path) -> None:
    """docs/slurm.sbatch with values that a shell would split, warned once."""
    venv = folder / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin/python").chmod(0o755)
    venv.rename(folder / "venv")
    (folder / "venv/.installed").touch()
    store = folder / "with a space $HOME"
    arguments = [*SLOW, f"run_dir='{folder}/runs/sbatch'", f"store.url='{store}'"]
    environment = {**ENVIRONMENT, "VENV": str(folder / "venv")}
    batch = ["sbatch", "--parsable", "--nodes=2", f"--output={folder}/sbatch.log", "docs/slurm.sbatch", "harvest", "1"]
    sent = subprocess.run([*batch, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    wait_for(lambda: len(list((store / "manifest").glob("*.json"))) >= 2)
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: not slurm("squeue", "-h", "-j", job).strip(), 280)
    log = (folder / "sbatch.log").read_text()
    assert re.search(r"resuming +\d+ contexts are in the store already", log), log
    same_files(slow_store, store)


def test_an_absent_submitit_is_one_line(folder: Path) -> None:
    hidden = folder / "hidden" / "hydra_plugins" / "hydra_submitit_launcher"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder / "hidden"), ENVIRONMENT["PYTHONPATH"]])}
    done = subprocess.run(
        command("train", *LAUNCHER, "debug=tiny_train"), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: hydra/launcher=slurm needs submitit: pip install 'granary-sae[slurm]'" in done.stderr
