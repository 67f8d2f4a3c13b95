"""Inspection as processes: several, killed, over S3's kind of storage, refused; always the same bytes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.basics.units import parse_bytes
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from stage_inspect.job import PART_TOKENS
from tests.cli import Child, ForkServer, environment
from tests.harvesting import make_model
from tests.inspection import HOOK, content, small_sae, small_store

SMALL = ("logits=false", "device=cpu", "latents.window=16", "latents.together_tokens=400", "latents.pool=12")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    small_store(folder / "store", num_contexts=60, seq_len=256)
    small_sae(folder / "sae")
    return folder


def test_the_command(study: Path, stages: ForkServer) -> None:
    here = stages.at(study)
    told = here.run("stage_inspect", ".", "dry_run=true", *SMALL)
    assert told.code == 0, told.stderr
    assert "per process at most" in told.stderr
    assert not (study / "latents").exists()
    done = here.run("stage_inspect", ".", *SMALL)
    assert done.code == 0, done.stderr
    before = content(study / "latents")
    (study / "latents/parts/000000.part").write_bytes(b"of a run that was killed when all but this was done")
    again = here.run("stage_inspect", ".", *SMALL)
    assert "is finished already" in again.stderr
    assert content(study / "latents") == before
    refused = here.run("stage_inspect", ".", *SMALL, "seed=1").error
    assert "holds the latents of another dictionary, store or settings" in refused
    assert "latents.overwrite=true" in refused
    assert content(study / "latents") == before
    from granary import Latents

    Latents.open(study / "latents").notes.set_note(1, "mine")
    done = here.run("stage_inspect", ".", *SMALL, "seed=1", "latents.overwrite=true")
    assert done.code == 0, done.stderr
    latents = Latents.open(study / "latents")
    assert latents.meta.settings["seed"] == 1
    assert latents.notes.note(1) == ""
    assert len(list((study / "latents").glob("notes-*.sqlite"))) == 1
    assert "latents.window=4: choose from 8" in here.run("stage_inspect", ".", "latents.window=4").error
    assert "no activation store at" in here.run("stage_inspect", ".", "store.url=nowhere", *SMALL).error


@pytest.mark.slow
def test_processes_and_kills_change_no_byte(study: Path, tmp_path: Path, stages: ForkServer) -> None:
    (tmp_path / "small_parts.py").write_text(RUN)
    common = [*SMALL, f"store.url={study / 'store'}", f"sae.path={study / 'sae'}"]

    def start(name: str) -> Child:
        arguments = [*common, f"run_dir={tmp_path}/run-{name}", f"latents.url={tmp_path / name}"]
        return stages.at(tmp_path).start(str(tmp_path / "small_parts.py"), *arguments)

    begun = time.monotonic()
    done = start("one").finish()
    assert done.code == 0, done.stderr
    whole, lasted = content(tmp_path / "one"), time.monotonic() - begun
    rng = np.random.default_rng(0)
    for number in range(20):
        name = f"killed-{number}"
        process = start(name)
        time.sleep(lasted * rng.uniform(0, 1.0))
        process.kill()
        process.wait()
        last = start(name).finish()
        assert last.code == 0, last.stderr
        assert content(tmp_path / name) == whole, name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_change_no_byte(study: Path, tmp_path: Path, ranks: int) -> None:
    store = small_store(tmp_path / "store", num_contexts=1200, seq_len=512, shard_contexts=40)
    assert store.num_contexts * store.seq_len > 2 * PART_TOKENS  # each rank has a part
    for name, nproc in (("one", 1), ("many", ranks)):
        arguments = [f"store.url={store.url}", f"sae.path={study / 'sae'}", f"nproc={nproc}"]
        command = [sys.executable, "-m", "stage_inspect", *SMALL, *arguments, f"latents.url={tmp_path / name}"]
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "many")


# Latents, contexts of 512 tokens.
MEMORY_SHAPES = [(2048, 32), (32_768, 32), (262_144, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("latents", "contexts"), MEMORY_SHAPES)
def test_the_peak_is_what_the_dry_run_told(tmp_path: Path, latents: int, contexts: int) -> None:
    """With the settings of real runs, 64 latents firing on a token; the figure told has two digits."""
    assert 0.9 <= peak_over_told(tmp_path, 32, latents, contexts, "logits=false") <= 1.1


@pytest.mark.slow
def test_the_peak_with_a_large_head_is_what_the_dry_run_told(tmp_path: Path) -> None:
    """Llama 3's vocabulary at a quarter of its width: most is the head. What started the process is large itself."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=1024, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    make_model(tmp_path / "model", LlamaForCausalLM(config).bfloat16())
    model = (f"model={tmp_path / 'model'}", "model.allow_other=true")
    assert 0.9 <= peak_over_told(tmp_path, 1024, 2048, 8, *model) <= 1.1


def peak_over_told(folder: Path, width: int, latents: int, contexts: int, *more: str) -> float:
    """The peak of an inspection of random activations, over what its dry run told."""
    small_store(folder / "store", num_contexts=contexts, seq_len=512, d_model=width, shard_contexts=4)
    config = SAEConfig(d_model=width, d_latent=latents, k=64, normalisation="none", sites=Sites.of(HOOK))
    SAE(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "sae")
    command = [sys.executable, "-c", PEAK, f"run_dir={folder}", "device=cpu", *more]
    dry, done = (
        subprocess.run([*command, *last], env=environment(), cwd=folder, capture_output=True, text=True, check=True)
        for last in (["dry_run=true"], [])
    )
    told = re.search(r"memory +([\d.]+ \w+) per process", dry.stderr)
    assert told is not None, dry.stderr
    return int(done.stdout.splitlines()[-1]) / parse_bytes(told[1], "memory")


# The stage, then the peak of its process in bytes.
PEAK = """
import runpy
from shared.basics.memory import peak_memory
runpy.run_module("stage_inspect", run_name="__main__", alter_sys=True)
print(peak_memory())
"""

# The command with smaller parts, so that a small store has many.
RUN = """
import runpy, stage_inspect.job
stage_inspect.job.PART_TOKENS = 1000
runpy.run_module("stage_inspect", run_name="__main__", alter_sys=True)
"""
