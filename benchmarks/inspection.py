"""The pass of an inspection against a bare read and encode of the same contexts, and its memory against the dry run's.

    python benchmarks/inspection.py            # 3 rounds; F 262,144 over 131,072 tokens; several minutes
    python benchmarks/inspection.py --quick    # one round of fewer tokens, under a minute

Activations are random, so every latent fires about equally often, which is more records than real ones give. The bare
pass reads the same contexts with the same threads and encodes them in the same blocks; both are done in turn, in one
process, and the ratio is that of each round. Memory is the peak of a process of its own that does the whole stage. The
last line is one JSON object.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from records import processor

from shared.basics.units import parse_bytes
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store.io.open import open_io
from stage_inspect.job import InspectJob
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.scan import scan
from tests.inspection import inspect_config
from tests.synthetic import synthetic_plan, synthetic_store

HOOK = "layers.2.resid_post"
# d_model, latents, k, tokens, tokens with --quick
SHAPES = {"demo": (128, 2048, 32, 524_288, 49_152), "wide": (1024, 32_768, 64, 65_536, 4096)}
MEMORY_SHAPE = (128, 262_144, 64, 131_072, 4096)
SEQ_LEN = 512
# What the stage itself would use, not the small numbers of tests.
KEYS = {"latents.window": 64, "latents.top": 100, "latents.sample": 128, "latents.token_sample": 128,
        "latents.together_tokens": 131_072, "latents.pool": 1024}  # fmt: skip


def make(folder: Path, d_model: int, latents: int, k: int, tokens: int) -> None:
    """A store of random activations and a random TopK SAE."""
    plan = synthetic_plan(
        max(2, tokens // SEQ_LEN), SEQ_LEN, d_model, hooks={HOOK: d_model}, shard_contexts=32, chunk_tokens=SEQ_LEN,
        heldout_fraction=0,
    )  # fmt: skip
    synthetic_store(folder / "store", plan)
    config = SAEConfig(d_model=d_model, d_latent=latents, k=k, normalisation="none", sites=Sites.of(HOOK))
    SAE(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "sae")


def passes(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of the bare pass and of the inspection's, in turn."""
    job = InspectJob.from_config(inspect_config(folder, **KEYS))
    dictionary = job.folder.load(torch.device("cpu"))
    settings = job.settings(dictionary)
    reader = BatchReader(job.store, dictionary, job.folder.sites, settings.window, job.store.isolated)
    seconds: dict[str, list[float]] = {"bare": [], "inspection": []}
    for number in range(rounds):
        begin = time.perf_counter()
        for part in job.parts:
            for _ in reader.batches(part):
                pass
        seconds["bare"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        scan(open_io(folder / str(number)), job, reader, settings, "", list(range(len(job.parts))), lambda _: None)
        seconds["inspection"].append(time.perf_counter() - begin)
    return seconds


def memory(folder: Path) -> dict[str, float]:
    """Bytes that the dry run tells, and the peak of the run itself."""
    script = "import resource, runpy, sys; runpy.run_module('stage_inspect', run_name='__main__', alter_sys=True)"
    script += "; print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    common = [sys.executable, "-c", script, f"run_dir={folder}", "logits=false", "device=cpu"]
    told = subprocess.run([*common, "dry_run=true"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"memory +([\d.]+ \w+) per process", told)
    assert found is not None, told
    done = subprocess.run(common, capture_output=True, text=True, check=True)
    return {"told": float(parse_bytes(found[1], "memory")), "peak": float(done.stdout.split()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads")
    result: dict[str, Any] = {}
    for name, (d_model, latents, k, full, quick) in SHAPES.items():
        tokens = quick if options.quick else full
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), d_model, latents, k, tokens)
            seconds = passes(Path(folder), 1 if options.quick else options.rounds)
        ratios = [ours / bare for ours, bare in zip(seconds["inspection"], seconds["bare"], strict=True)]
        result[name] = {way: statistics.median(found) for way, found in seconds.items()}
        result[name] |= {"ratio": statistics.median(ratios), "tokens": tokens}
        print(f"  {name}: D {d_model}, F {latents:,}, k {k}, {tokens:,} tokens: bare {result[name]['bare']:.2f} s, "
              f"inspection {result[name]['inspection']:.2f} s, ratio {result[name]['ratio']:.2f}")  # fmt: skip
    d_model, latents, k, full, quick = MEMORY_SHAPE
    latents = 32_768 if options.quick else latents
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), d_model, latents, k, quick if options.quick else full)
        result["memory"] = memory(Path(folder))
    told, peak = result["memory"]["told"], result["memory"]["peak"]
    print(f"  memory: F {latents:,}: dry run {told / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {peak / told:.2f} of it")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
