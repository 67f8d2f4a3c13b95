"""A Lorsa on two processes, its contexts or its heads shared out, is that of one; cut by rows it is refused."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import weights

pytestmark = pytest.mark.slow

READS, WRITES = "layers.1.attn_in", "layers.1.attn_out"
WORDS = shlex.split(
    "variant=lorsa variant.attention=plain variant.qk_init=random variant.qk_heads=4 variant.qk_width=3 sae.k=3 "
    "sae.expansion=2 sae.dead_after_tokens=60 sae.auxk_alpha=0.5 store.url=store run_dir=. stream.batch_size=64 "
    "schedule.tokens=1120 logger.progress=false logger.curves=false checkpoint.every=0 device.threads=1 optim.lr=3e-3 "
    f"reads={READS} writes={WRITES}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Path:
    folder = tmp_path_factory.mktemp("lorsa")
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
    assert "error: parallel=fsdp cuts matrices by rows of latents, and a lorsa's heads serve many" in done.stderr
    done = train(folder, "odd", "nproc=2", "parallel=latent", "variant.qk_heads=3")
    assert "error: the 3 heads of queries and keys do not divide among parallel.latent=2" in done.stderr
    done = train(folder, "few", "nproc=2", "parallel=ddp", "stream.batch_size=16")
    assert "error: stream.batch_size=16: 1 contexts do not divide among 2 processes" in done.stderr
