"""Replicas and tensor parallelism, in real gloo processes on this machine."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.store import Store
from tests.cli import ForkServer
from tests.families import FAMILIES
from tests.harvesting import ENVIRONMENT, Harvester, same_files

WORKER = Path(__file__).with_name("harvest_worker.py")
# Sums are taken in another order. bfloat16 keeps 8 bits, and each branch of each layer rounds anew.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("ranks")
    harvester = Harvester(root, stages.at(root))
    harvester.harvest("one")
    return harvester


# Norms of queries and keys, norms behind the branches, branches side by side; the others are slow.
SHARDED = ("qwen3", "gemma3", "pythia")


@pytest.fixture(scope="module")
def four_ranks(harvester: Harvester) -> list[list[str]]:
    """What the worker printed: sharded trunks of these families; on the way it harvested two stores."""
    jobs = [harvester.arguments("dp4"), harvester.arguments("dp2tp2", tensor_parallel=2)]
    return on_four_ranks(harvester, SHARDED, jobs)


def on_four_ranks(harvester: Harvester, families: Sequence[str], jobs: list[list[str]]) -> list[list[str]]:
    """The worker's lines in words."""
    folder = harvester.root / "-".join(families)
    for family in families:
        config = FAMILIES[family]()
        config.num_attention_heads, config.hidden_size = 4, 32
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = 4
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    ranks = harvester.server.ranks(4, str(WORKER), str(folder), json.dumps(jobs))
    assert [rank.code for rank in ranks] == [0] * 4, ranks
    return [line.split() for rank in ranks for line in rank.stdout.splitlines()]


def test_sharded_trunks_give_the_activations_of_whole_ones(four_ranks: list[list[str]]) -> None:
    assert_as_whole(four_ranks, SHARDED)


@pytest.mark.slow
def test_sharded_trunks_of_the_other_families(harvester: Harvester) -> None:
    others = [family for family in FAMILIES if family not in SHARDED]
    assert_as_whole(on_four_ranks(harvester, others, []), others)


def assert_as_whole(told: list[list[str]], families: Sequence[str]) -> None:
    assert len(told) == len(families) * 2 * 2
    for family, dtype, tp, worst, share in told:
        assert float(worst) < TOLERANCE[dtype], (family, dtype, tp)
        assert float(share) < 1 / int(tp) + 0.1, (family, tp)  # norms and biases are on every rank


@pytest.mark.usefixtures("four_ranks")
def test_replicas_of_two_ranks_give_the_store_of_one_rank(harvester: Harvester) -> None:
    one, sharded = Store.open(harvester.root / "one"), Store.open(harvester.root / "dp2tp2")
    assert sharded.complete
    for context in range(one.num_contexts):
        wanted, got = (store.read_context("layers.1.resid_post", context) for store in (one, sharded))
        assert (got - wanted).norm() < TOLERANCE["float32"] * wanted.norm()


@pytest.mark.usefixtures("four_ranks")
def test_four_replicas_write_the_bytes_of_one(harvester: Harvester) -> None:
    same_files(harvester.root / "one", harvester.root / "dp4")


@pytest.mark.slow  # the next one starts them by the same command line, and the ranks' bytes are compared above
def test_the_command_line_starts_its_ranks(harvester: Harvester) -> None:
    command = [sys.executable, "-m", "stage_harvest", *harvester.arguments("two", nproc=2)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=harvester.root, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("harvested") == 1  # one rank speaks
    same_files(harvester.root / "one", harvester.root / "two")


@pytest.mark.slow  # through torchrun; tests/unit/launch has the same of a small script
def test_a_rank_that_fails_ends_the_job(harvester: Harvester) -> None:
    """NaN in a shard of rank 1 alone: its line, its status, and no rank left waiting."""
    tokens = Store.open(harvester.root / "one").tokens(range(8))
    poison = next(int(token) for token in tokens[4:].ravel() if not (tokens[:4] == token).any())
    weights = load_file(harvester.model / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    shutil.copytree(harvester.model, harvester.root / "poisoned")
    save_file(weights, harvester.root / "poisoned" / "model.safetensors", {"format": "pt"})
    changes = {"model": harvester.root / "poisoned", "corpus__contexts": 8, "store__heldout_fraction": 0}
    command = [sys.executable, "-m", "stage_harvest", *harvester.arguments("nan", nproc=2, **changes)]
    start = time.monotonic()
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=harvester.root, timeout=300)
    manifest = harvester.root / "nan" / "manifest"
    assert run.returncode == 2
    context, position = np.argwhere(tokens == poison)[0]
    lines = [line for line in run.stderr.replace("\r", "\n").splitlines() if "error" in line]
    assert len(lines) == 1, run.stderr
    assert f"error (rank 1): layers.1.resid_post: context {context}, position {position} is NaN" in lines[0]
    assert [path.name for path in manifest.glob("*")] in ([], ["00000000.json"])
    assert time.monotonic() - start < 250


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "victim"), [("dp", 1), ("dp", 0), ("tp", 1), ("tp", 0)])
def test_a_rank_that_is_killed_ends_the_job_and_the_rerun_finishes(
    harvester: Harvester, layout: str, victim: int
) -> None:
    changes = {"store__shard_contexts": 1, "batch_contexts": 1}
    if not (harvester.root / "undisturbed").exists():
        harvester.harvest("undisturbed", **changes)
    store = f"{layout}{victim}"
    if layout == "tp":
        changes["tensor_parallel"] = 2
    command = [sys.executable, "-m", "stage_harvest", *harvester.arguments(store, nproc=2, **changes)]
    log = harvester.root / f"{store}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=stream, cwd=harvester.root)
    manifest = harvester.root / store / "manifest"
    deadline = time.monotonic() + 120
    while not (manifest.is_dir() and any(manifest.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks = {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "stage_harvest" in child.cmdline() and "RANK" in child.environ()
    }
    assert sorted(ranks) == [0, 1]
    start = time.monotonic()
    ranks[victim].kill()
    assert process.wait(timeout=100) == 128 + signal.SIGKILL
    assert time.monotonic() - start < 60
    assert psutil.wait_procs(list(ranks.values()), timeout=5)[1] == []
    text = log.read_text()
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert lines == [
        f"error: rank {victim} was killed by SIGKILL (for lack of memory?); run the same command again to continue"
    ]
    assert "Traceback" not in text
    whole = Store.open(harvester.root / "undisturbed")
    assert 0 < len(Store.open(harvester.root / store).committed()) < whole.num_shards
    rerun = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=harvester.root, timeout=300)
    assert rerun.returncode == 0, rerun.stderr
    if layout == "dp":
        same_files(harvester.root / "undisturbed", harvester.root / store)
    again = Store.open(harvester.root / store)
    assert again.complete
    for context in range(whole.num_contexts):
        wanted, got = (s.read_context("layers.1.resid_post", context) for s in (whole, again))
        assert (got - wanted).norm() < TOLERANCE["float32"] * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("survivor", [0, 1])
def test_a_machine_that_dies_ends_the_job_on_the_others(harvester: Harvester, survivor: int) -> None:
    """Two launchers as two machines; one is killed with all that runs on it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {"store__shard_contexts": 1, "batch_contexts": 1, "corpus__files": harvester.root / "more.txt"}
    (harvester.root / "more.txt").write_text("\n---\n".join(harvester.documents * 200))
    store = f"machines{survivor}"
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=granary"]
    launch = [sys.executable, "-m", "shared.launch.torchrun", *rendezvous, "--nproc-per-node=1", "-m", "stage_harvest"]
    machines = []
    for number in range(2):
        log = (harvester.root / f"machine{number}.log").open("w")
        with log:
            command = [*launch, *harvester.arguments(store, **changes)]
            machines.append(subprocess.Popen(command, env=ENVIRONMENT, stderr=log, cwd=harvester.root))
    manifest = harvester.root / store / "manifest"
    deadline = time.monotonic() + 120
    while not (manifest.is_dir() and any(manifest.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    rank_of = {}
    for number, machine in enumerate(machines):
        (rank,) = [c for c in psutil.Process(machine.pid).children() if "RANK" in c.environ()]
        rank_of[int(rank.environ()["RANK"])] = (number, rank)
    dead, _ = rank_of[1 - survivor]
    start = time.monotonic()
    for child in psutil.Process(machines[dead].pid).children(recursive=True):
        child.kill()
    machines[dead].kill()
    machines[dead].wait()
    alive, _ = rank_of[survivor]
    assert machines[alive].wait(timeout=100) != 0
    assert time.monotonic() - start < 60
    text = (harvester.root / f"machine{alive}.log").read_text()
    # The rank's line or the launcher's, whichever notices first; torch's own warnings may stand beside it.
    assert 1 <= text.count("its machine may be gone; run the same command again to continue") <= 2, text
    assert "Traceback" not in text
    assert len(Store.open(harvester.root / store).committed()) < Store.open(harvester.root / store).num_shards


def test_a_division_that_leaves_ranks_over_is_one_line(harvester: Harvester) -> None:
    error = harvester.run("refused", tensor_parallel=2).error
    assert error.startswith("tensor_parallel=2 does not divide the 1 processes of this job")
