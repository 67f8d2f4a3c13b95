"""Whole harvests against the bare truncated forward on the same tokens: what reading, hooks, copies and writing cost.

    python benchmarks/harvest.py            # float32 on the CPU, 3 layers of d_model 2048, 4096-token contexts
    python benchmarks/harvest.py --quick    # smaller, under a minute
    python benchmarks/harvest.py --gpu      # Llama-3.1-8B's shape in bfloat16, layer 16, random weights
    python benchmarks/harvest.py --gpu --dry-run    # every code path of that at a tiny size, on a CPU too

Each round times, one after the other: the bare forward (load the truncated model, run it over all tokens, keep
nothing), a harvest of the last layer, and a harvest of all layers; every second round goes the other way about. A
harvest is everything that the command does once Python's imports are done: tokenising, packing, loading, forward,
statistics, checksums, writing, the final record. A ratio is the median over rounds of the two times of one round; the
spread over rounds stands beside it. Tokenising is timed alone too. The last line is one JSON object.
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from records import print_result, processor
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from shared.bundled import MODEL_DIR, stdlib
from shared.lm import load_trunk, packed_inputs
from shared.store import Store
from stage_harvest.config import register
from stage_harvest.harvest import harvest
from stage_harvest.job import HarvestJob
from stage_harvest.tokens.encoder import default_workers

SEPARATOR = "<|endoftext|>"
# Dense bfloat16 tensor-core peaks of data sheets, FLOP/s.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Shape:
    """What is run."""

    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    contexts: int
    seq_len: int
    rounds: int
    dtype: str


QUICK = Shape(1024, 2816, 8, 4, 3, 4096, 4, 4096, 2, "float32")
CPU = Shape(2048, 5632, 16, 8, 3, 4096, 4, 4096, 3, "float32")
GPU = Shape(4096, 14336, 32, 8, 17, 128256, 64, 4096, 3, "bfloat16")
DRY = Shape(64, 224, 4, 2, 3, 4096, 8, 64, 2, "bfloat16")


def make_model(shape: Shape, folder: Path) -> None:
    """A LLaMA with random weights and the bundled tokenizer."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq_len,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)


def peak_flops(device: str, size: int) -> float:
    """bfloat16 multiply-adds x 2 per second of a square product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * size**3 / Timer("a @ b", globals={"a": a, "b": b}).blocked_autorange(min_run_time=1).median)


def make_corpus(path: Path, characters: int) -> None:
    """Python sources between separator lines."""
    with path.open("w") as file:
        for _, text in stdlib.documents("all", include_tests=True):
            file.write(f"{text}\n{SEPARATOR}\n")
            if file.tell() > characters:
                return


def configuration(shape: Shape, root: Path, layers: str, store: Path) -> Any:
    """The harvest's configuration, as the command line would make it."""
    overrides = [
        f"model.path={root / 'model'}",
        f"model.dtype={shape.dtype}",
        f"run_dir={root}",
        f"store.url={store}",
        f"corpus.contexts={shape.contexts}",
        f"packing.seq_len={shape.seq_len}",
        f"store.shard_contexts={max(1, shape.contexts // 8)}",
        "store.heldout_fraction=0",
        "corpus=text",
        f"corpus.files={root / 'corpus.txt'}",
        f"corpus.separator='{SEPARATOR}'",
        f"hooks.layers={layers}",
    ]
    return OmegaConf.to_object(compose("harvest", overrides=overrides))


def bare_forward(shape: Shape, root: Path, store: Store, batch_contexts: int) -> tuple[float, float]:
    """Seconds to load the trunk and run it over the store's tokens; seconds of the forwards alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    trunk = load_trunk(str(root / "model"), shape.dtype, num_layers=shape.layers, device=device)
    loaded = time.perf_counter()
    with torch.no_grad():
        for first in range(0, shape.contexts, batch_contexts):
            batch = range(first, min(first + batch_contexts, shape.contexts))
            tokens, segments = (
                torch.from_numpy(rows(batch)).long().to(device) for rows in (store.tokens, store.segments)
            )
            trunk(**packed_inputs(trunk, tokens, segments, isolated=True))
    if device == "cuda":
        torch.cuda.synchronize()
    end = time.perf_counter()
    return end - start, end - loaded


def tokenising_rate(job: HarvestJob) -> float:
    """Tokens per second of the workers over the whole corpus, their start included."""
    start, tokens = time.perf_counter(), 0
    tokeniser = job.tokeniser(default_workers())
    with tokeniser.encoder:
        for ids in tokeniser.corpus_ids(job.corpus, job.cfg.corpus, 0):
            tokens += ids.size
    return tokens / (time.perf_counter() - start)


def forward_flops(shape: Shape, segments: Any) -> float:
    """Multiply-adds of the trunk, twice, attention within documents included."""
    head = shape.d_model // shape.heads
    weights = shape.d_model * (2 * shape.d_model + 2 * shape.kv_heads * head + 3 * shape.d_mlp)
    attention = 0
    for row in segments:
        lengths = torch.unique_consecutive(torch.from_numpy(row), return_counts=True)[1]
        attention += int((lengths.double() ** 2).sum() / 2)
    tokens = segments.size
    return float(shape.layers * (2 * tokens * weights + 4 * attention * shape.d_model))


def measure(shape: Shape, root: Path) -> dict[str, Any]:
    """Alternate the three and compare."""
    make_model(shape, root / "model")
    make_corpus(root / "corpus.txt", 16_000_000)
    cfg = configuration(shape, root, str(shape.layers - 1), root / "warm")
    harvest(cfg)  # makes the tokens that the bare forward reads, and warms up
    tokens = Store.open(root / "warm")
    job = HarvestJob.from_config(cfg)
    layers = {"one": str(shape.layers - 1), "all": "all"}
    count = shape.contexts * shape.seq_len
    if count * shape.layers * shape.d_model * 2 > 0.9 * shutil.disk_usage(root).free:
        print(f"all {shape.layers} layers do not fit under {root}: one hook only")
        del layers["all"]
    seconds: dict[str, list[float]] = {"bare": [], **{name: [] for name in layers}}
    forwards = []
    stored = {}
    for number in range(shape.rounds):
        for name in list(seconds)[:: -1 if number % 2 else 1]:
            if name == "bare":
                whole, forward = bare_forward(shape, root, tokens, job.batch_contexts)
                forwards.append(forward)
            else:
                start = time.perf_counter()
                harvest(configuration(shape, root, layers[name], root / name))
                whole = time.perf_counter() - start
                stored[name] = Store.open(root / name).summary()["bytes"]
                shutil.rmtree(root / name)
            seconds[name].append(whole)
    forward = statistics.median(forwards)
    tokenising = tokenising_rate(job)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {os.cpu_count()} cores"
    result = {
        "benchmark": "harvest",
        "device": device,
        "shape": f"d_model {shape.d_model}, {shape.layers} layers, {shape.contexts} x {shape.seq_len}, {shape.dtype}",
        "bare_s": round(statistics.median(seconds["bare"]), 2),
    }
    for name in layers:
        ratios = [whole / bare for whole, bare in zip(seconds[name], seconds["bare"], strict=True)]
        median = statistics.median(seconds[name])
        result |= {
            f"{name}_ratio": round(statistics.median(ratios), 3),
            f"{name}_ratios": [round(ratio, 3) for ratio in sorted(ratios)],
            f"{name}_tokens_per_s": round(count / median),
            f"{name}_MB_per_s": round(stored[name] / median / 1e6, 1),
        }
    flops = forward_flops(shape, tokens.segments(range(shape.contexts))) / forward
    return result | {
        "forward_tokens_per_s": round(count / forward),
        "tokenising_tokens_per_s": round(tokenising),
        "tokenising_over_forward": round(tokenising / (count / forward), 1),
        "forward_TFLOP_per_s": round(flops / 1e12, 2),
        **shares_of_peak(shape, device, flops),
    }


def shares_of_peak(shape: Shape, device: str, flops: float) -> dict[str, float]:
    """The forward's `flops` per second against a large product measured here and the data sheet; bfloat16 alone."""
    if shape.dtype != "bfloat16":
        return {}
    where = "cuda" if torch.cuda.is_available() else "cpu"
    measured = peak_flops(where, 8192 if where == "cuda" else 512)
    shares = {"product_TFLOP_per_s": round(measured / 1e12, 2), "forward_share_of_product": round(flops / measured, 3)}
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    return shares if peak is None else shares | {"forward_share_of_peak": round(flops / peak, 3)}


def main() -> None:
    """Run one shape and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--gpu", action="store_true", help="Llama-3.1-8B's shape in bfloat16; needs CUDA")
    parser.add_argument("--dry-run", action="store_true", help="the paths of --gpu at a tiny size, on a CPU too")
    parser.add_argument("--contexts", type=int, help="another number of contexts")
    parser.add_argument("--rounds", type=int, help="another number of rounds")
    parser.add_argument("--folder", help="where model and stores go; default: the temporary folder")
    arguments = parser.parse_args()
    if arguments.gpu and not arguments.dry_run and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device; --gpu --dry-run runs its code at a tiny size on a CPU")
    shape = DRY if arguments.dry_run else GPU if arguments.gpu else QUICK if arguments.quick else CPU
    changes = {"contexts": arguments.contexts, "rounds": arguments.rounds}
    shape = replace(shape, **{name: value for name, value in changes.items() if value})
    logging.disable(logging.INFO)
    register()
    with (
        tempfile.TemporaryDirectory(prefix="granary-bench-", dir=arguments.folder) as folder,
        initialize_config_module("conf", version_base="1.3"),
    ):
        result = measure(shape, Path(folder))
    for name, value in result.items():
        print(f"{name:28} {value}")
    print_result(result)


if __name__ == "__main__":
    main()
