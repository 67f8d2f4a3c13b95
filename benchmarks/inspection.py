"""The pass of an inspection against a bare read and encode of the same contexts, and its memory against the dry run's.

    python benchmarks/inspection.py            # 3 rounds; F 262,144 over 131,072 tokens; several minutes
    python benchmarks/inspection.py --quick    # one round of fewer tokens, under a minute
    python benchmarks/inspection.py --only peers

Activations are random, so every latent fires about equally often, which is more records than real ones give. The bare
pass reads the same contexts with the same threads and encodes them in the same blocks; both are done in turn, in one
process, and the ratio is that of each round. Memory is the peak of a process of its own that does the whole stage.
The peers (SAEDashboard, delphi's cache; `make setup-peers`, left out where they are not installed) are given the
same tokens and activations without a language model, each in a process of its own; SAEDashboard is asked for 128
latents and the time for all is that times F / 128. The last line is one JSON object.
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

import numpy as np
import torch
from records import print_result, processor

from shared.basics.units import parse_bytes
from shared.sae.config import SAEConfig
from shared.sae.loading import convert
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from shared.store.io.open import open_io
from stage_inspect.job import InspectJob
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.scan import scan
from tests.inspection import inspect_config
from tests.synthetic import synthetic_plan, synthetic_store

HOOK = "layers.2.resid_post"
# d_model, latents, k, tokens, tokens with --quick
SHAPES = {"demo": (128, 2048, 32, 524_288, 49_152), "wide": (1024, 32_768, 64, 65_536, 4096)}
MEMORY_SHAPE = (32, 262_144, 64, 131_072, 4096)
PEERS_TOKENS, PEERS_LATENTS, VOCABULARY = 65_536, 128, 4096
PEERS_PYTHON = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
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


def stage(folder: Path, *arguments: str) -> tuple[dict[str, float], str]:
    """Seconds, processor seconds and peak bytes of a process that does the whole stage; and what it told."""
    script = "import json, resource, runpy, sys, time; start = time.perf_counter()"
    script += "; runpy.run_module('stage_inspect', run_name='__main__', alter_sys=True)"
    script += "; print(json.dumps({'seconds': time.perf_counter() - start, 'busy': time.process_time(),"
    script += " 'peak': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))"
    command = [sys.executable, "-c", script, f"run_dir={folder}", "logits=false", "device=cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


def memory(folder: Path) -> dict[str, float]:
    """Bytes that the dry run tells, and the peak of the run itself."""
    told = stage(folder, "dry_run=true")[1]
    found = re.search(r"memory +([\d.]+ \w+) per process", told)
    assert found is not None, told
    return {"told": float(parse_bytes(found[1], "memory")), **stage(folder)[0]}


def peers(folder: Path, threads: int, python: Path) -> dict[str, dict[str, float]]:
    """Seconds, processor seconds, peak bytes and tokens encoded of this stage and of the peers, on the same latents."""
    store = Store.open(str(folder / "store"))
    tokens_RT = store.tokens(np.arange(store.num_contexts)) % VOCABULARY
    x_RTD = torch.stack([store.read_context(HOOK, context) for context in range(store.num_contexts)])
    D, F = x_RTD.shape[-1], SHAPES["demo"][1]
    unembedding_DV = np.random.default_rng(0).standard_normal((D, VOCABULARY)).astype(np.float32)
    for name, array in (("activations", x_RTD.float().numpy()), ("tokens", tokens_RT), ("unembedding", unembedding_DV)):
        np.save(folder / name, array)
    found = {"granary": {**stage(folder, f"device.threads={threads}")[0], "encoded": tokens_RT.size}}
    for peer, form in (("saedashboard", "saelens"), ("delphi", "sparsify")):
        convert(str(folder / "sae"), folder / form, form)
        job = {name: str(folder / f"{name}.npy") for name in ("activations", "tokens", "unembedding")}
        job |= {"sae": str(folder / form), "out": str(folder / peer), "latents": PEERS_LATENTS, "threads": threads}
        (folder / f"{peer}.json").write_text(json.dumps(job))
        worker = [python, str(Path(__file__).parent / "inspection_peers.py"), peer, str(folder / f"{peer}.json")]
        done = subprocess.run(worker, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  {peer}: left out, it ends with {done.stderr.strip().splitlines()[-1]}")
            continue
        found[peer] = json.loads(done.stdout.splitlines()[-1])
        if peer == "saedashboard":
            found[peer] |= {name: found[peer][name] * F / PEERS_LATENTS for name in ("seconds", "busy", "encoded")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["passes", "memory", "peers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads")
    result: dict[str, Any] = {}
    if options.only in (None, "passes"):
        show_passes(result, options)
    if options.only in (None, "memory"):
        show_memory(result, options)
    if options.only == "peers" or (options.only is None and not options.quick):
        show_peers(result, options)
    print_result(result)


def show_passes(result: dict[str, Any], options: argparse.Namespace) -> None:
    """The pass against the bare one."""
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


def show_memory(result: dict[str, Any], options: argparse.Namespace) -> None:
    """The peak against what the dry run tells."""
    d_model, latents, k, full, quick = MEMORY_SHAPE
    latents = 32_768 if options.quick else latents
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), d_model, latents, k, quick if options.quick else full)
        result["memory"] = memory(Path(folder))
    told, peak = result["memory"]["told"], result["memory"]["peak"]
    print(f"  memory: F {latents:,}: dry run {told / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {peak / told:.2f} of it")


def show_peers(result: dict[str, Any], options: argparse.Namespace) -> None:
    """This stage beside the peers, where they are installed."""
    if not options.peers_python.exists():
        print(f"  peers: left out, {options.peers_python} is not there: make setup-peers")
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), *SHAPES["demo"][:3], PEERS_TOKENS)
        result["peers"] = peers(Path(folder), options.threads, options.peers_python)
    for name, row in result["peers"].items():
        print(f"  {name}: {row['seconds']:.1f} s ({row['busy']:.1f} s busy), peak {row['peak'] / 1e9:.2f} GB, "
              f"{row['encoded']:,.0f} tokens encoded for {PEERS_TOKENS:,}")  # fmt: skip


if __name__ == "__main__":
    main()
