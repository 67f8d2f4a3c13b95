"""The store on a real S3 server against curl on the same server: write and read throughput, paired.

    tests/servers/s3_up.sh && python benchmarks/s3.py [--quick]

curl PUTs and GETs the very bytes of a shard (--aws-sigv4), one object after the other. Ours is `write_shard` (two
hooks, so two objects in flight; statistics and checksums included) and `read_context` by 4 threads into tensors that
exist, checksums compared. Through obstore and through plain fsspec (s3fs). Client, gateway and storage daemon share the
machine, so this compares processor time per byte. Endpoint and keys: the usual AWS variables, or those of s3_up.sh.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from records import print_result

from shared.store import Store
from shared.store.buffers import bits_of, byte_view
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens

DEFAULTS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:18080", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testsecret",
    "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip
TARGETS = {"obstore_write": 0.65, "obstore_read": 0.85, "fsspec_write": 0.4, "fsspec_read": 0.65}
HOOKS = {"layers.2.resid_post": 4096, "layers.3.resid_post": 4096}
READ_THREADS = 4


def curl(*arguments: str) -> float:
    """Seconds of one transfer."""
    sign = f"aws:amz:{os.environ['AWS_REGION']}:s3"
    user = f"{os.environ['AWS_ACCESS_KEY_ID']}:{os.environ['AWS_SECRET_ACCESS_KEY']}"
    begin = time.perf_counter()
    unsigned = "x-amz-content-sha256: UNSIGNED-PAYLOAD"  # what curl 7.88 signs of an upload is refused otherwise
    subprocess.run(["curl", "-sSf", "--aws-sigv4", sign, "--user", user, "-H", unsigned, *arguments], check=True)
    return time.perf_counter() - begin


def without_obstore() -> "mock._patch[Callable[..., object]]":
    """Make the store believe that obstore is not installed."""
    find = importlib.util.find_spec
    return mock.patch("importlib.util.find_spec", lambda name, *rest: None if name == "obstore" else find(name, *rest))


def measure(contexts: int, pairs: int, clients: list[str]) -> tuple[dict[str, float], dict[str, object]]:
    import s3fs

    bucket = f"bench-{uuid.uuid4().hex[:8]}"
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.mkdir(bucket)
    plan = synthetic_plan(
        num_contexts=contexts, seq_len=4096, d_model=4096, hooks=HOOKS, shard_contexts=contexts, chunk_tokens=1024,
        heldout_fraction=0.0,
    )  # fmt: skip
    tokens = synthetic_tokens(plan)
    ratios: dict[str, float] = {}
    details: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        local = Store.create(folder, plan, *tokens)
        activations = {hook: rows.bfloat16() for hook, rows in synthetic_shard(local, 0).items()}
        raw = {hook: Path(folder) / f"{hook}.raw" for hook in HOOKS}
        for hook, path in raw.items():
            path.write_bytes(byte_view(bits_of(activations[hook])))
        size = sum(path.stat().st_size for path in raw.values())
        out = [torch.empty(4096, 4096, dtype=torch.bfloat16).fill_(0) for _ in range(READ_THREADS)]
        url = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/raw"

        def curl_put() -> float:
            return sum(curl("-T", str(path), f"{url}/{hook}", "-o", "/dev/null") for hook, path in raw.items())

        def curl_get() -> float:
            return sum(curl(f"{url}/{hook}", "-o", "/dev/null") for hook in raw)

        for client in clients:
            with without_obstore() if client == "fsspec" else mock.MagicMock():
                times: dict[str, list[tuple[float, float]]] = {"write": [], "read": []}
                for number in range(pairs + 1):
                    store = Store.create(f"s3://{bucket}/{client}-{number}", plan, *tokens)

                    def ours_put(store: Store = store) -> float:
                        begin = time.perf_counter()
                        store.write_shard(0, activations)
                        return time.perf_counter() - begin

                    def ours_get(store: Store = store) -> float:
                        free = list(out)

                        def read(job: tuple[str, int]) -> None:
                            target = free.pop()
                            store.read_context(*job, target)
                            free.append(target)

                        jobs = [(hook, context) for hook in HOOKS for context in range(contexts)]
                        begin = time.perf_counter()
                        with ThreadPoolExecutor(READ_THREADS) as pool:
                            list(pool.map(read, jobs))
                        return time.perf_counter() - begin

                    for name, theirs, ours in (("write", curl_put, ours_put), ("read", curl_get, ours_get)):
                        pair = (theirs(), ours()) if number % 2 else (ours(), theirs())[::-1]
                        if number:  # the first one warms up
                            times[name].append(pair)
                    files.rm(f"{bucket}/{client}-{number}", recursive=True)
                for name, found in times.items():
                    key = f"{client}_{name}"
                    each = [theirs / ours for theirs, ours in found]
                    ratios[key] = round(statistics.median(each), 3)
                    speeds = [size / 1e6 / statistics.median(side) for side in zip(*found, strict=True)]
                    details[key] = {
                        "curl_mb_per_s": round(speeds[0]),
                        "ours_mb_per_s": round(speeds[1]),
                        "range": [round(min(each), 3), round(max(each), 3)],
                        "pairs": len(each),
                    }
                    print(
                        f"{key:14} {ratios[key]:5.2f} (target {TARGETS[key]})  {min(each):.2f}-{max(each):.2f}  "
                        f"curl {speeds[0]:.0f} MB/s, ours {speeds[1]:.0f} MB/s",
                        flush=True,
                    )
    files.rm(bucket, recursive=True)
    return ratios, details


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="67 MB objects instead of 134, 3 pairs instead of 5")
    parser.add_argument("--clients", default="obstore,fsspec")
    options = parser.parse_args()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    answer = subprocess.run(["curl", "-s", "-o", "/dev/null", os.environ["AWS_ENDPOINT_URL"]], check=False)
    if answer.returncode:
        print(f"no S3 server at {os.environ['AWS_ENDPOINT_URL']}: start one with tests/servers/s3_up.sh")
        print_result({"ratios": {}})
        return
    contexts, pairs = (2, 3) if options.quick else (4, 5)
    ratios, details = measure(contexts, pairs, options.clients.split(","))
    print_result({"ratios": ratios, "details": details})


if __name__ == "__main__":
    main()
