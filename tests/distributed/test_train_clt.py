"""A CLT on two processes, whole or sharded, is that of one; split by latents it is refused."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import weights

pytestmark = pytest.mark.slow

HOOKS = tuple(f"layers.{layer}.{site}" for layer in range(3) for site in ("mlp_in", "mlp_out"))
WORDS = shlex.split(
    "variant=clt sae=batchtopk sae.k=6 sae.expansion=4 sae.dead_after_tokens=60 sae.auxk_alpha=0.5 store.url=store "
    "run_dir=. stream.batch_size=16 stream.lanes=4 schedule.tokens=320 logger.progress=false logger.curves=false "
    "checkpoint.every=0 device.threads=1 reads=layers.*.mlp_in writes=layers.*.mlp_out"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Path:
    folder = tmp_path_factory.mktemp("clt")
    planted_store(folder / "store", hooks=HOOKS)
    return folder


def train(folder: Path, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stage_train", *WORDS, f"out_dir={name}", f"hydra.run.dir={name}", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_twenty_steps_on_two_processes(folder: Path, tying: str) -> None:
    layouts = {"one": [], "ddp": ["nproc=2", "parallel=ddp"], "fsdp": ["nproc=2", "parallel=fsdp"]}
    for name, words in layouts.items():
        done = train(folder, f"{tying}_{name}", f"variant.tying={tying}", *words)
        assert done.returncode == 0, done.stderr
    one = weights(folder / f"{tying}_one")
    for name in ("ddp", "fsdp"):
        for key, tensor in weights(folder / f"{tying}_{name}").items():
            assert_close_in_norm(tensor, one[key], 2 * SAME_RUN, REORDERED)


def test_latents_of_several_groups_are_not_split(folder: Path) -> None:
    done = train(folder, "split", "nproc=2", "parallel=latent")
    assert done.returncode != 0
    assert (
        "error: parallel=latent splits the one group of latents of other dictionaries, a clt has its latents layer by "
        "layer: use parallel=layers, ddp or fsdp" in done.stderr
    )
