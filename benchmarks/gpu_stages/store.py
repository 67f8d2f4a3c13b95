"""Stage ``store``: the published load from a store on disk, by the command that users give.

262,144 latents of width 4,096, k 128, contexts of 4,096: harvested once, so that training reads in place of the model.
It needs zarr and hydra, and 35 GB of disk; a machine without them says so and goes on.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_stages.context import PUBLISHED, Context

NEEDED = ("zarr", "hydra", "omegaconf", "numcodecs")
OWN = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Load:
    """A store's shape and a dictionary's."""

    d_model: int = 4096
    seq_len: int = 4096
    contexts: int = 128
    shard_contexts: int = 8
    d_latent: int = 262_144
    k: int = 128
    batch: int = 32_768
    steps: int = 96


TINY = Load(d_model=16, seq_len=16, contexts=16, shard_contexts=8, d_latent=64, k=4, batch=32, steps=24)


def run(context: Context) -> None:
    """Make the store, train from it, and read what the run wrote."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        context.say("store", left_out=f"{', '.join(missing)} not installed")
        return
    load = TINY if context.rehearse else Load()
    with tempfile.TemporaryDirectory(dir=context.out) as folder:
        begin = time.monotonic()
        num_bytes = fill(Path(folder) / "store", load)
        seconds = time.monotonic() - begin
        context.say("store write", gb=num_bytes / 1e9, seconds=seconds, gb_per_s=num_bytes / 1e9 / seconds)
        begin = time.monotonic()
        train(Path(folder), load, context)
        seconds = time.monotonic() - begin
        lines = [json.loads(line) for line in (Path(folder) / "sae" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line][1:]
    speed = statistics.median(speeds)
    training = load.steps * load.batch / speed
    context.say(
        "store train", tokens_per_s=speed, over_published=speed / PUBLISHED, gb_per_s=speed * load.d_model * 2 / 1e9,
        wait_share=statistics.median([line["wait_share"] for line in lines if "wait_share" in line][1:]),
        fvu=lines[-1]["fvu"], start_and_export_s=seconds - training,
    )  # fmt: skip


def fill(url: Path, load: Load) -> int:
    """Write a store whose shards all hold the same activations; returns the bytes of these."""
    from shared.store import Store
    from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens

    plan = synthetic_plan(
        num_contexts=load.contexts, seq_len=load.seq_len, d_model=load.d_model, shard_contexts=load.shard_contexts,
        chunk_tokens=min(1024, load.seq_len), heldout_fraction=0.0,
    )  # fmt: skip
    store = Store.create(url, plan, *synthetic_tokens(plan))
    rows = {hook: x.bfloat16() for hook, x in synthetic_shard(store, 0).items()}
    for shard in store.pending():
        store.write_shard(shard, rows)
    store.finalize()
    return load.contexts * load.seq_len * load.d_model * 2


def train(folder: Path, load: Load, context: Context) -> None:
    """``python -m stage_train``; its output goes on to this stage's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(OWN)
    command = [
        sys.executable, "-m", "stage_train", f"run_dir={folder}", f"store.url={folder / 'store'}",
        f"sae.d_latent={load.d_latent}", f"sae.k={load.k}", f"stream.batch_size={load.batch}",
        f"schedule.tokens={load.steps * load.batch}", "optim.moments=bfloat16", "logger.every=8",
        "logger.progress=false", "logger.curves=false", "checkpoint.every=1.0", f"device.name={context.device}",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=environment, cwd=OWN)
