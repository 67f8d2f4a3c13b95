"""Eight SAEs from one stream against eight runs in turn: wall time and bytes read, on this disk and on a slow one.

    python benchmarks/packed.py            # 230,000 tokens for each of 8 SAEs, three rounds
    python benchmarks/packed.py --quick    # fewer tokens, one round, under a minute

Both ways train the same SAEs (d_model 256; k 8 to 64, expansion 2 and 4) from the same configurations, each way in a
process of its own, in turn. Seconds are those from the first configuration to the last exported SAE, imports left out;
bytes are those the process asked the system to read meanwhile. The slow disk is this one with its reads delayed to
30 MB/s, one job's share where sixteen read through a link of 4 Gbit/s. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from records import print_result, processor
from store import throttle

from shared.store import Store
from tests.synthetic import synthetic_plan, synthetic_store

D_MODEL, SEQ_LEN = 256, 1024
KS, EXPANSIONS = (8, 16, 32, 64), (2, 4)
SLOW_DISK = 30e6  # bytes/s


def work(way: str, store: str, out: str, tokens: int, limit: float) -> dict[str, float]:
    """Train all SAEs in this process, one after the other or together."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from shared.parallel import World
    from stage_train import config
    from stage_train.data import stores
    from stage_train.job import Job

    if limit:
        opened = Store.open
        stores.Store.open = lambda url: throttle(opened(url), limit)  # type: ignore[method-assign, assignment]
    config.register()
    cfgs: list[Any] = []
    with initialize_config_module("conf", version_base="1.3"):
        for k in KS:
            for expansion in EXPANSIONS:
                overrides = [
                    f"store.url={store}", f"out_dir='{out}/k={k},expansion={expansion}'", f"sae.k={k}",
                    f"sae.expansion={expansion}", f"schedule.tokens={tokens}", "checkpoint.every=0",
                    "logger.progress=false", "logger.curves=false",
                ]  # fmt: skip
                cfgs.append(OmegaConf.to_object(compose("train", overrides=overrides)))
    world = World(0, 1, 0, torch.device("cpu"))
    before, begin = bytes_read(), time.perf_counter()
    for batch in [cfgs] if way == "packed" else [[cfg] for cfg in cfgs]:
        Job(batch, world).execute()
    return {"seconds": time.perf_counter() - begin, "bytes": bytes_read() - before}


def bytes_read() -> int:
    """Of this process so far, by system calls, page cache or not."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def measure(way: str, folder: Path, tokens: int, limit: float, threads: int) -> dict[str, float]:
    """In a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--work", way, str(folder / "store"), out, str(tokens), str(limit)]
        done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        torch.set_num_threads(options.threads)
        way, store, out, tokens, limit = options.work
        print(json.dumps(work(way, store, out, int(tokens), float(limit))))
        return
    contexts, rounds = (40, 1) if options.quick else (256, options.rounds)
    ratios, table = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = synthetic_plan(contexts, SEQ_LEN, D_MODEL, shard_contexts=8, chunk_tokens=SEQ_LEN, heldout_fraction=0.01)
        store = synthetic_store(folder / "store", plan)
        tokens = int(store.mask(store.contexts("train")).sum())  # one pass
        print(f"{len(KS) * len(EXPANSIONS)} SAEs, {tokens:,} tokens each, {processor()}, {options.threads} threads")
        for disk, limit in (("this disk", 0.0), ("30 MB/s", SLOW_DISK)):
            found: dict[str, list[dict[str, float]]] = {"in turn": [], "packed": []}
            for _ in range(rounds):
                for way, results in found.items():
                    results.append(measure(way, folder, tokens, limit, options.threads))
            row = {
                way: {name: statistics.median(result[name] for result in results) for name in ("seconds", "bytes")}
                for way, results in found.items()
            }
            for way, values in row.items():
                print(f"  {disk:10} {way:8} {values['seconds']:7.1f} s  {values['bytes'] / 1e6:8.1f} MB read")
            table[disk] = row
            key = disk.replace(" ", "_").replace("/", "_per_")
            for name in ("seconds", "bytes"):
                pairs = [a[name] / b[name] for a, b in zip(found["in turn"], found["packed"], strict=True)]
                ratios[f"{key}_{name}_in_turn_over_packed"] = round(statistics.median(pairs), 3)
    print_result({"saes": len(KS) * len(EXPANSIONS), "tokens": tokens, "ratios": ratios, "table": table})


if __name__ == "__main__":
    main()
