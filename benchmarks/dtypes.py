"""Storage types side by side: bytes per token, speed, error, and what an SAE trained on them loses.

    python benchmarks/dtypes.py --quick                       the bundled model, one seed, a minute
    python benchmarks/dtypes.py --model DIR --text FILE       a LLaMA and a text file of one's own
    python benchmarks/dtypes.py --part speed                  the speed alone (or: quality)

Quality: the same harvest is run once per type, through the command line; the same SAE is trained on each store with
each seed; every SAE is scored on the held-out activations of the **float32** store, so that a type can't hide its error
in its own targets. Speed: one shard at d_model 4096 after the other, written (fsync) and read back warm into one
preallocated tensor, types in turn, median of the rounds.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from records import print_result

from shared.sae import SAE
from shared.store import Store
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens

KINDS = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "lz4"), ("bfloat16", "zstd"), ("float16", "none"),
         ("int8", "none"), ("int8", "lz4")]  # fmt: skip
QUALITY = ["float32", "bfloat16", "float16", "int8"]  # codecs are lossless
D_MODEL, SEQ_LEN, SHARD_CONTEXTS = 4096, 1024, 16


def name(kind: tuple[str, str]) -> str:
    dtype, codec = kind
    return dtype if codec == "none" else f"{dtype} {codec}"


def stage(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stderr}")


def harvest(folder: Path, dtype: str, options: argparse.Namespace) -> Store:
    url = folder / dtype
    corpus = ["corpus=stdlib", f"corpus.contexts={options.contexts}", "packing.seq_len=512", "store.shard_contexts=8"]
    if options.text:
        corpus = ["corpus=text", f"corpus.files={options.text}", f"corpus.separator='{options.separator}'",
                  "packing.seq_len=512", f"corpus.contexts={options.contexts}", "store.shard_contexts=50"]  # fmt: skip
    stage(
        "stage_harvest", f"name=dtypes-{dtype}", f"run_dir={folder / 'runs' / dtype}", f"store.url={url}",
        f"model={options.model}", *corpus, "hooks.layers=2", "store.heldout_fraction=0.0125",
        "store.heldout_placement=last", f"store.dtype={dtype}", "device.threads=1",
    )  # fmt: skip
    return Store.open(url)


def train(folder: Path, dtype: str, seed: int, options: argparse.Namespace) -> Path:
    out = folder / "runs" / dtype / f"sae-{seed}"
    stage(
        "stage_train", f"name=dtypes-{dtype}-{seed}", f"run_dir={folder / 'runs' / dtype}", f"out_dir={out}",
        f"store.url={folder / dtype}", f"seed={seed}", f"schedule.tokens={options.tokens}", "sae.k=32",
        "sae.expansion=8", "device.threads=1", "logger.progress=false", "logger.curves=false",
    )  # fmt: skip
    return out


def moments(store: Store, hook: str) -> tuple[torch.Tensor, list[int]]:
    """Mean of the held-out trainable positions, and their contexts."""
    contexts = store.contexts("heldout").tolist()
    total, count = torch.zeros(store.plan.hooks[hook], dtype=torch.float64), 0
    for context in contexts:
        rows = store.read_context(hook, context)[torch.from_numpy(store.mask([context])[0])].double()
        total += rows.sum(0)
        count += len(rows)
    return total / count, contexts


def relative_error(store: Store, reference: Store, hook: str) -> float:
    """Squared difference to the float32 store over the variance, held-out positions."""
    mean, contexts = moments(reference, hook)
    error = variance = 0.0
    for context in contexts:
        chosen = torch.from_numpy(reference.mask([context])[0])
        exact = reference.read_context(hook, context)[chosen].double()
        error += float(((store.read_context(hook, context)[chosen].double() - exact) ** 2).sum())
        variance += float(((exact - mean) ** 2).sum())
    return error / variance


def heldout_fvu(sae_folder: Path, reference: Store, hook: str) -> float:
    """Fraction of variance unexplained on the float32 store's held-out positions."""
    sae = SAE.from_pretrained(sae_folder)
    mean, contexts = moments(reference, hook)
    error = variance = 0.0
    for context in contexts:
        x = reference.read_context(hook, context)[torch.from_numpy(reference.mask([context])[0])].float()
        with torch.no_grad():
            found = sae(x).x_hat
        error += float(((x - found).double() ** 2).sum())
        variance += float(((x.double() - mean) ** 2).sum())
    return error / variance


def quality(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    dtypes = ["float32", "int8"] if options.quick else QUALITY
    stores = {dtype: harvest(folder, dtype, options) for dtype in dtypes}
    reference = stores["float32"]
    hook = reference.hooks[0]
    found: dict[str, dict[str, Any]] = {}
    for dtype, store in stores.items():
        fvu = [heldout_fvu(train(folder, dtype, seed, options), reference, hook) for seed in range(options.seeds)]
        found[dtype] = {"relative_squared_error": relative_error(store, reference, hook), "fvu": fvu}
        loss = [a - b for a, b in zip(fvu, found["float32"]["fvu"], strict=True)]
        found[dtype]["fvu_loss"] = statistics.mean(loss)
        print(
            f"{dtype:9} error {found[dtype]['relative_squared_error']:.2e}  FVU {statistics.mean(fvu):.5f}  "
            f"loss against float32 {statistics.mean(loss):+.5f} ({', '.join(f'{value:+.5f}' for value in loss)})",
            flush=True,
        )
    return found


def speed(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """bfloat16 tensors in (as a model leaves them; float32 for float32), tokens per second of one shard."""
    shard_tokens = SHARD_CONTEXTS * SEQ_LEN
    write, read, size = defaultdict(list), defaultdict(list), {}
    made: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for turn in range(rounds + 1):  # the first round warms up
        for kind in KINDS:
            dtype, codec = kind
            plan = synthetic_plan(
                num_contexts=SHARD_CONTEXTS, seq_len=SEQ_LEN, d_model=D_MODEL, shard_contexts=SHARD_CONTEXTS,
                chunk_tokens=SEQ_LEN, dtype=dtype, codec=codec, heldout_fraction=0.0,
            )  # fmt: skip
            url = folder / "speed"
            store = Store.create(url, plan, *synthetic_tokens(plan))
            offered = {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)
            if offered not in made:
                made[offered] = {hook: rows.to(offered) for hook, rows in synthetic_shard(store, 0).items()}
            begin = time.perf_counter()
            record = store.write_shard(0, made[offered])
            middle = time.perf_counter()
            out = torch.empty(SEQ_LEN, D_MODEL, dtype=store.read_dtype)
            store.read_context(store.hooks[0], 0, out)
            third = time.perf_counter()
            for context in range(SHARD_CONTEXTS):
                store.read_context(store.hooks[0], context, out)
            end = time.perf_counter()
            if turn:
                write[kind].append(shard_tokens / (middle - begin))
                read[kind].append(shard_tokens / (end - third))
            size[kind] = record.num_bytes / shard_tokens
            del store
            shutil.rmtree(url)
    found = {}
    for kind in KINDS:
        tokens_written, tokens_read = statistics.median(write[kind]), statistics.median(read[kind])
        found[name(kind)] = {
            "bytes_per_token": size[kind],
            "write_tokens_per_s": tokens_written,
            "read_tokens_per_s": tokens_read,
            "write_mb_per_s": tokens_written * size[kind] / 1e6,
            "read_mb_per_s": tokens_read * size[kind] / 1e6,
        }
        figures = found[name(kind)]
        print(
            f"{name(kind):14} {size[kind]:8.0f} B/token  write {figures['write_mb_per_s']:7.0f} MB/s "
            f"{tokens_written:9.0f} tok/s  read {figures['read_mb_per_s']:7.0f} MB/s {tokens_read:9.0f} tok/s",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=["all", "quality", "speed"], default="all")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", help="text file; default: Python's standard library")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--contexts", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    if options.quick:
        options.contexts, options.tokens, options.seeds, options.rounds = 80, 10_000, 1, 1
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.part != "speed":
            found["quality"] = quality(Path(folder), options)
        if options.part != "quality":
            found["speed"] = speed(Path(folder), options.rounds)
    print_result(found)


if __name__ == "__main__":
    main()
