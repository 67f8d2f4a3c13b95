"""A MoLT on two processes, whole or split by transforms, is that of one; cut by rows it is refused."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import weights

pytestmark = pytest.mark.slow

READS, WRITES = "layers.1.mlp_in", "layers.1.mlp_out"
WORDS = shlex.split(
    "variant=molt 'variant.ranks={4:2,2:4,1:2}' sae.k=2 sae.dead_after_tokens=30 sae.auxk_alpha=0.5 store.url=store "
    "run_dir=. stream.batch_size=16 stream.lanes=4 schedule.tokens=320 logger.progress=false logger.curves=false "
    f"checkpoint.every=0 device.threads=1 optim.lr=3e-3 reads={READS} writes={WRITES}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Path:
    folder = tmp_path_factory.mktemp("molt")
    planted_store(folder / "store", hooks=(READS, WRITES))
    return folder


def train(folder: Path, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stage_train", *WORDS, f"out_dir={name}", f"hydra.run.dir={name}", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("sae", ["topk", "batchtopk", "jumprelu"])
def test_twenty_steps_on_two_processes(folder: Path, sae: str) -> None:
    own = [f"sae={sae}", *(["sae.k=null"] if sae == "jumprelu" else [])]
    layouts = {"one": [], "ddp": ["nproc=2", "parallel=ddp"], "latent": ["nproc=2", "parallel=latent"]}
    for name, words in layouts.items():
        done = train(folder, f"{sae}_{name}", *own, *words)
        assert done.returncode == 0, done.stderr
    one = weights(folder / f"{sae}_one")
    for name in ("ddp", "latent"):
        for key, tensor in weights(folder / f"{sae}_{name}").items():
            assert_close_in_norm(tensor, one[key], 2 * SAME_RUN, REORDERED)


def test_what_does_not_divide_is_refused(folder: Path) -> None:
    done = train(folder, "rows", "nproc=2", "parallel=fsdp")
    assert (
        "error: parallel=fsdp cuts matrices by rows, and the rows of a molt's transform belong together" in done.stderr
    )
    done = train(folder, "odd", "nproc=2", "parallel=latent", "variant.ranks={4:1,2:3}")
    assert "error: the 1 transforms of rank 4 do not divide among parallel.latent=2" in done.stderr
