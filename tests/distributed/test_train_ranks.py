"""Training in several real processes equals training in one; stops and faults on one rank are everyone's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from shared.basics.metrics_file import read_metrics
from shared.sae import load_provenance
from shared.store import Store
from stage_train.state.checkpoint import newest_checkpoint
from tests.cli import ForkServer
from tests.ranks import Runs, assert_same_run

FIXED = ["sae.k=3", "sae.expansion=8", "stream.batch_size=21", "stream.lanes=4", "schedule.tokens=630"]
FIXED += ["logger.progress=false", "logger.curves=false", "logger.every=5", "checkpoint.every=0"]
FIXED += ["sae.dead_after_tokens=40"]
FREE = "sae.k=null"
TWO_SITES = ["reads=layers.0.mlp_in", "writes=layers.0.mlp_out", "store.url={folder}/sites"]
LAYOUTS = ["ddp", "fsdp", "latent"]
STARTS = {
    "topk": ["sae=topk"],
    "many": ["sae=topk", "sae.k=700"],
    "subspace": ["sae=topk", "sae.init_subspace=5", "sae.bias_init=geometric_median"],
    "batchtopk": ["sae=batchtopk"],
    "relu": ["sae=relu", FREE],
    "jumprelu": ["sae=jumprelu", FREE],
    "gated": ["sae=gated", FREE],
    "norms": ["sae=batchtopk", "sae.encoder_init=norm_search", "sae.unit_norm_decoder=false"],
    "skip": ["variant=skip_transcoder", *TWO_SITES],
    "transcoder": ["variant=transcoder", "sae=jumprelu", FREE, *TWO_SITES],
    "crosscoder": ["variant=crosscoder", "variant.gate=sum", "sae=batchtopk", *TWO_SITES],
}
"""Of which a rank makes its part: each activation, search and kind of one group."""


# Of wide dictionaries.
WIDE = ["sae.auxk_slope=0.3"]
# Under latent, whose start is that of fsdp too; the others are slow.
COMMON = ("topk", "subspace", "jumprelu", "skip", "crosscoder")


def starts_under(layout: str) -> list[str]:
    return {"ddp": ["topk"], "fsdp": ["skip"], "latent": [*COMMON]}[layout]


@pytest.fixture(scope="module")
def runs(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Runs:
    """All runs of one and two processes, with one start of the two."""
    runs = Runs(stages, tmp_path_factory.mktemp("ranks"), *FIXED)
    planted_store(runs.folder / "store", outliers=3)
    planted_store(runs.folder / "sites", hooks=("layers.0.mlp_in", "layers.0.mlp_out"))
    runs.alone(
        runs.job("one"),
        runs.job("to_fsdp", job="signalled", step=9),
        runs.job("one_outliers", "stream.max_norm_multiple=1.5"),
        runs.job("one_short", "stream.batch_size=1", "schedule.tokens=20"),
    )
    assert runs.ends["to_fsdp"] == {"stopped"}
    runs.together(
        2,
        runs.job("ddp"),
        runs.job("fsdp", "parallel=fsdp"),
        runs.job("fsdp_micro", "parallel=fsdp", "optim.micro_batch=4"),
        runs.job("latent", "parallel=latent"),
        runs.job("to_fsdp", "parallel=fsdp"),
        runs.job("from_latent", "parallel=latent", job="signalled", step=13),
        runs.job("from_ddp", job="signalled", step=13),
        runs.job("poisoned", job="poisoned", step=7),
        *(started(runs, name, layout) for layout in LAYOUTS for name in starts_under(layout)),
        runs.job("lanes", "stream.lanes=3"),
        runs.job("odd", "parallel=latent", "sae.d_latent=95"),
        runs.job("outliers", "stream.max_norm_multiple=1.5"),
        runs.job("short", "stream.batch_size=1", "schedule.tokens=20"),
        runs.job("short_fsdp", "parallel=fsdp", "stream.batch_size=1", "schedule.tokens=20"),
    )
    assert runs.ends["from_latent"] == runs.ends["from_ddp"] == {"stopped"}
    runs.alone(runs.job("from_latent"), runs.job("from_ddp"))
    return runs


def started(runs: Runs, name: str, layout: str) -> dict[str, Any]:
    changes = [change.format(folder=runs.folder) for change in STARTS[name]]
    return runs.job(f"{name}_{layout}", f"parallel={layout}", *changes, "sae.d_latent=1024", job="started")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_its_part_of_the_start_and_makes_no_more(runs: Runs, layout: str) -> None:
    for name in starts_under(layout):
        assert runs.ends[f"{name}_{layout}"] == {"the same: True, no more: True"}, name


@pytest.mark.slow
def test_parts_of_the_other_starts(runs: Runs) -> None:
    others = [(name, "latent") for name in STARTS if name not in COMMON] + [("topk", "fsdp"), ("batchtopk", "fsdp")]
    runs.together(2, *(started(runs, *other) for other in others))
    for name, layout in others:
        assert runs.ends[f"{name}_{layout}"] == {"the same: True, no more: True"}, name


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp_micro", "latent"])
def test_every_layout_equals_one_process(runs: Runs, layout: str) -> None:
    """Weights, losses, dead counts, gradient norms: 30 steps with dead latents, short batches and a new epoch."""
    assert runs.ends[layout] == {"done"}
    assert_same_run(runs, "one", layout)
    assert any(line["auxk"] > 0 for line in read_metrics(runs.folder / "one"))
    assert read_metrics(runs.folder / "one")[-1]["epoch"] >= 1


@pytest.mark.parametrize("name", ["to_fsdp", "from_latent", "from_ddp"])
def test_resume_under_another_layout_and_number_of_processes(runs: Runs, name: str) -> None:
    """Weights, and metrics: those of the logging window that the stop cut, too."""
    assert runs.ends[name] == {"done"}
    assert_same_run(runs, "one", name)


@pytest.mark.slow
def test_a_slope_is_the_same_in_every_layout_and_resumed(runs: Runs) -> None:
    runs.alone(runs.job("one_wide", *WIDE), runs.job("wide_to_latent", *WIDE, job="signalled", step=13))
    layouts = {f"wide_{layout}": [f"parallel={layout}", *WIDE] for layout in LAYOUTS}
    layouts["wide_to_latent"] = layouts["wide_latent"]
    runs.together(2, *(runs.job(name, *words) for name, words in layouts.items()))
    for name in layouts:
        assert runs.ends[name] == {"done"}
        assert_same_run(runs, "one_wide", name)


def test_a_nan_on_one_rank_stops_all_with_the_same_line(runs: Runs) -> None:
    (line,) = runs.ends["poisoned"]
    assert "training diverged by step 10 (loss nan" in line


def test_what_does_not_divide_stops_all_ranks(runs: Runs) -> None:
    assert "3 lanes do not divide among 2 processes" in runs.ends["lanes"].pop()
    assert "95 latents do not divide among parallel.latent=2" in runs.ends["odd"].pop()


def test_ranks_find_the_same_outliers_as_one_process(runs: Runs) -> None:
    runs.assert_close("one_outliers", "outliers")
    first, second = (load_provenance(runs.folder / name) for name in ("one_outliers", "outliers"))
    assert first["tokens"] == second["tokens"]
    runs_without = load_provenance(runs.folder / "one")
    assert first["tokens"] != runs_without["tokens"] or first["steps"] != runs_without["steps"]


@pytest.mark.parametrize("name", ["short", "short_fsdp"])
def test_ranks_without_rows_take_part(runs: Runs, name: str) -> None:
    """Batches of one token: in every step one of the two ranks has none."""
    runs.assert_close("one_short", name)


@pytest.mark.slow
def test_four_processes_and_a_mesh(runs: Runs) -> None:
    """Latents in two parts, each twice; FSDP and DDP on four; resumed on four from a mesh and from two processes."""
    mesh = ["parallel=latent", "parallel.latent=2"]
    runs.together(2, runs.job("four_from_two", "parallel=fsdp", job="signalled", step=13))
    runs.together(
        4,
        runs.job("mesh", *mesh),
        runs.job("four_ddp"),
        runs.job("four_fsdp", "parallel=fsdp"),
        runs.job("four_from_two", *mesh),
        runs.job("one_from_mesh", *mesh, job="signalled", step=13),
    )
    runs.alone(runs.job("one_from_mesh"))
    for name in ("mesh", "four_ddp", "four_fsdp", "four_from_two", "one_from_mesh"):
        assert_same_run(runs, "one", name)


@pytest.mark.slow  # through torchrun; tests/unit/launch has a rank that fails, tests/pipeline Ctrl-C of one process
@pytest.mark.parametrize(("number", "name"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_to_the_command_reaches_the_ranks(runs: Runs, number: signal.Signals, name: str) -> None:
    """SIGUSR1 to ``python -m stage_train nproc=2``, as Slurm sends it, or Ctrl-C: all ranks save and end."""
    job = runs.job(name, f"run_dir={runs.folder}", "nproc=2", "schedule.tokens=20_000_000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "stage_train", *job["overrides"]],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            deadline = time.monotonic() + 280
            while not read_metrics(runs.folder / name):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            _, errors = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert f"stopped by {name} after step" in errors
    assert "Traceback" not in errors
    assert newest_checkpoint(runs.folder / name / "checkpoints") is not None
