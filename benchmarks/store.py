"""The activation store against raw files, zarr-python and torchdata: paired ratios at d_model 4096.

    python benchmarks/store.py [--quick] [--folder DIR] [--only write,read,...]

Each figure is the median over pairs of (reference seconds / our seconds), so above 1 is faster than the reference; the
two sides of a pair do the same work one directly after the other, in alternating order, in this process. Raw writing is
write + fsync + rename of the same bytes; raw reading is a copy from a memmap (warm) or readinto (cold) into a tensor
that exists. Cold means posix_fadvise(DONTNEED) on every file of the store just before. GB are 1e9 bytes of bfloat16.

torchdata (optional: pip install 'granary-sae[bench]') is skipped, and says so, where it is not installed.
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import print_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared.store import Store
from shared.store.buffers import bits_of, byte_view, empty_to_read, empty_to_write
from shared.store.format.dtypes import BFloat16Bits
from shared.store.io.local import LocalIO
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens

D, T, SHARD = 4096, 4096, 8  # one shard is 268 MB of bfloat16
HOOK = "layers.2.resid_post"
TARGETS = {
    "write": 0.85, "write_no_checksum": 0.9, "read_warm": 0.9, "random_cold": 0.85, "batches_vs_dataloader": 3.0,
    "lz4_cold_2_threads": 0.8, "zarr_write": 1.5, "zarr_read": 4.0, "int8_tokens_disk_limited": 1.5,
}  # fmt: skip


class Bench:
    """A folder, a size, and the ratios found so far."""

    def __init__(self, folder: Path, shards: int, pairs: int, seq_len: int) -> None:
        self.folder, self.shards, self.pairs, self.seq_len = folder, shards, pairs, seq_len
        self.plan = self.make_plan("bfloat16", "none")
        self.tokens = synthetic_tokens(self.plan)
        store = Store.create(folder / "seed", self.plan, *self.tokens)
        self.activations = {}
        for hook, rows in synthetic_shard(store, 0).items():
            self.activations[hook] = empty_to_write(rows.shape, torch.bfloat16).copy_(rows)
        self.ratios: dict[str, float] = {}
        self.details: dict[str, Any] = {}

    def make_plan(self, dtype: str, codec: str, shards: int | None = None) -> Any:
        return synthetic_plan(
            num_contexts=SHARD * (shards or self.shards), seq_len=self.seq_len, d_model=D, shard_contexts=SHARD,
            chunk_tokens=1024, dtype=dtype, codec=codec, heldout_fraction=0.0,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return self.plan.num_contexts * self.seq_len * D * 2

    def store(self, dtype: str = "bfloat16", codec: str = "none") -> Store:
        """A filled store, made once."""
        url = self.folder / f"{dtype}-{codec}"
        made = Store.create(url, self.make_plan(dtype, codec), *self.tokens)
        for shard in made.pending():
            made.write_shard(shard, self.activations)
        return made

    def pair(self, name: str, reference: Callable[[], float], ours: Callable[[], float], share: float = 1.0) -> None:
        """Run both by turns; each returns its seconds for a `share` of `num_bytes`."""
        if self.pairs > 3:  # the median of three bears a first pair that warms up
            reference()
            ours()
        found = []
        for number in range(self.pairs):
            if number % 2:
                mine, theirs = ours(), reference()
            else:
                theirs, mine = reference(), ours()
            found.append((theirs, mine))
        ratios = [theirs / mine for theirs, mine in found]
        self.ratios[name] = round(statistics.median(ratios), 3)
        speeds = [share * self.num_bytes / 1e9 / statistics.median(side) for side in zip(*found, strict=True)]
        self.details[name] = {
            "reference_gb_per_s": round(speeds[0], 3),
            "ours_gb_per_s": round(speeds[1], 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "pairs": len(ratios),
        }
        target = f" (target {TARGETS[name]})" if name in TARGETS else ""
        print(
            f"{name:26} {self.ratios[name]:6.2f}{target}   {min(ratios):.2f}-{max(ratios):.2f}   "
            f"reference {speeds[0]:.2f} GB/s, ours {speeds[1]:.2f} GB/s",
            flush=True,
        )


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drop_cache(folder: Path | str) -> None:
    """Ask the kernel to forget every file of a folder."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def bench_write(bench: Bench) -> None:
    """Shards to disk, fsynced: raw, ours (statistics, NaN check, checksums), and our file layer alone."""
    payload = byte_view(bits_of(bench.activations[HOOK]))
    step = payload.nbytes // SHARD

    def raw() -> float:
        folder = bench.folder / "raw"
        folder.mkdir()

        def work() -> None:
            for shard in range(bench.shards):
                fd = os.open(folder / "tmp", os.O_WRONLY | os.O_CREAT, 0o644)
                for start in range(0, payload.nbytes, step):
                    view = payload[start : start + step]
                    while view:
                        view = view[os.write(fd, view) :]
                os.fsync(fd)
                os.close(fd)
                os.rename(folder / "tmp", folder / str(shard))

        seconds = timed(work)
        shutil.rmtree(folder)
        return seconds

    def ours() -> float:
        store = Store.create(bench.folder / "ours", bench.plan, *bench.tokens)

        def work() -> None:
            for shard in range(bench.shards):
                store.write_shard(shard, bench.activations)

        seconds = timed(work)
        shutil.rmtree(bench.folder / "ours")
        return seconds

    def layer() -> float:
        io = LocalIO(str(bench.folder / "layer"))
        pieces = [payload[start : start + step] for start in range(0, payload.nbytes, step)]
        seconds = timed(lambda: [io.put(str(shard), pieces) for shard in range(bench.shards)])
        shutil.rmtree(bench.folder / "layer")
        return seconds

    bench.pair("write", raw, ours)
    bench.pair("write_no_checksum", raw, layer)


def bench_read(bench: Bench) -> None:
    """Warm, in order, into tensors that exist: a memmap copy on one thread, and `read_context` on two threads and one.

    A memmap copy checks nothing; the figures called verified compare every checksum, as training does.
    """
    store = bench.store()
    out = empty_to_read((SHARD, bench.seq_len, D), torch.bfloat16).fill_(0)
    target = bits_of(out)
    raw = bench.folder / "raw-read"
    raw.mkdir(exist_ok=True)
    for shard in range(bench.shards):
        bits_of(bench.activations[HOOK]).tofile(raw / str(shard))

    def memmap() -> float:
        def work() -> None:
            for shard in range(bench.shards):
                np.copyto(target, np.memmap(raw / str(shard), np.uint16, "r", shape=target.shape))

        return timed(work)

    def ours(threads: int, verify: bool) -> Callable[[], float]:
        def read(context: int) -> None:
            store.read_context(HOOK, context, out[context % SHARD], verify=verify)

        def work() -> None:
            if threads == 1:
                for context in range(bench.plan.num_contexts):
                    read(context)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(read, range(bench.plan.num_contexts)))

        return lambda: timed(work)

    bench.pair("read_warm", memmap, ours(2, False))
    bench.pair("read_warm_verified", memmap, ours(2, True))
    bench.pair("read_warm_1_thread", memmap, ours(1, False))
    bench.pair("read_warm_1_thread_verified", memmap, ours(1, True))


def cold_reader(store: Store, threads: int, order: list[int]) -> Callable[[], float]:
    """Contexts in an order, cold, by some threads, checksums included."""
    free = [empty_to_read((store.seq_len, D), store.read_dtype).fill_(0) for _ in range(threads)]

    def read(context: int) -> None:
        out = free.pop()
        store.read_context(HOOK, context, out)
        free.append(out)

    def run() -> float:
        drop_cache(store.url)
        with ThreadPoolExecutor(threads) as pool:
            return timed(lambda: list(pool.map(read, order)))

    return run


def raw_cold(bench: Bench, store: Store) -> Callable[[], float]:
    """readinto of the same shard files, in order, cold."""
    buffer = bytearray(32 << 20)
    files = sorted(Path(store.url).glob("layers/2/resid_post/c/*/0/0"))

    def run() -> float:
        drop_cache(store.url)

        def work() -> None:
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        return timed(work)

    return run


def shuffled(bench: Bench) -> list[int]:
    order = list(range(bench.plan.num_contexts))
    random.Random(0).shuffle(order)
    return order


def bench_cold(bench: Bench) -> None:
    """Whole contexts in random order, and an lz4 store, against reading the uncompressed files in order."""
    store = bench.store()
    reference = raw_cold(bench, store)
    bench.pair("random_cold", reference, cold_reader(store, 4, shuffled(bench)))
    bench.pair("lz4_cold_2_threads", reference, cold_reader(bench.store(codec="lz4"), 2, shuffled(bench)))


def bench_int8(bench: Bench) -> None:
    """Tokens per second of an int8 store against a bfloat16 one: this disk, and one throttled to a network disk."""
    both = [bench.store(), bench.store("int8")]
    one, two = (cold_reader(store, 4, shuffled(bench)) for store in both)
    bench.pair("int8_tokens_this_disk", one, two)
    limited = [throttle(Store.open(store.url), 300e6) for store in both]
    few = shuffled(bench)[: max(8, bench.plan.num_contexts // 4)]  # a throttled disk needs no long look
    one, two = (cold_reader(store, 4, few) for store in limited)
    bench.pair("int8_tokens_disk_limited", one, two, share=len(few) / bench.plan.num_contexts)


def throttle(store: Store, bytes_per_s: float) -> Store:
    """The store as on a disk of that speed: reads wait their turn."""
    import threading

    lock, read_checked = threading.Lock(), store.io.read_checked
    free_at = [0.0]

    def limited(key: str, offset: int, buffers: Any) -> list[int]:
        size = sum(len(buffer) for buffer in buffers)
        with lock:
            free_at[0] = max(free_at[0], time.perf_counter()) + size / bytes_per_s
            until = free_at[0]
        found = read_checked(key, offset, buffers)
        time.sleep(max(0.0, until - time.perf_counter()))
        return found

    store.io.read_checked = limited  # type: ignore[method-assign]
    return store


def bench_zarr(bench: Bench) -> None:
    """zarr-python's own pipeline: same layout, same codecs, same files; its writes are not fsynced, ours are."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    store = bench.store()
    rows = bits_of(bench.activations[HOOK])
    out = empty_to_read((SHARD, bench.seq_len, D), torch.bfloat16).fill_(0)
    shape = (bench.plan.num_contexts, bench.seq_len, D)

    def zarr_write() -> float:
        array = zarr.create_array(
            bench.folder / "zarr", shape=shape, chunks=(1, bench.plan.chunk_rows, D), shards=(SHARD, bench.seq_len, D),
            dtype=BFloat16Bits(), serializer=BytesCodec(endian="little"), compressors=[Crc32cCodec()], overwrite=True,
        )  # fmt: skip

        def work() -> None:
            for shard in range(bench.shards):
                array[shard * SHARD : (shard + 1) * SHARD] = rows

        return timed(work)

    def ours_write() -> float:
        made = Store.create(bench.folder / "ours", bench.plan, *bench.tokens)
        seconds = timed(lambda: [made.write_shard(shard, bench.activations) for shard in range(bench.shards)])
        shutil.rmtree(bench.folder / "ours")
        return seconds

    def zarr_read() -> float:
        array = zarr.open_group(store.url, mode="r")["layers/2/resid_post"]

        def work() -> None:
            for shard in range(bench.shards):
                array[shard * SHARD : (shard + 1) * SHARD]

        return timed(work)

    def ours_read() -> float:
        def read(context: int) -> None:
            store.read_context(HOOK, context, out[context % SHARD])

        with ThreadPoolExecutor(2) as pool:
            return timed(lambda: list(pool.map(read, range(shape[0]))))

    bench.pair("zarr_write", zarr_write, ours_write)
    shutil.rmtree(bench.folder / "zarr")
    bench.pair("zarr_read", zarr_read, ours_read)


class Shuffled(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """What one would write around a store for a data loader: groups of contexts, rows permuted, batches cut."""

    def __init__(self, url: str, group: int, batch: int) -> None:
        self.url, self.group, self.batch = url, group, batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        store = Store.open(self.url)
        order = torch.randperm(store.num_contexts, generator=torch.Generator().manual_seed(0)).tolist()
        info = torch.utils.data.get_worker_info()
        groups = [order[i : i + self.group] for i in range(0, len(order), self.group)]
        for group in groups[info.id :: info.num_workers] if info else groups:
            rows = torch.cat([store.read_context(HOOK, context) for context in group])
            for index in torch.randperm(len(rows)).split(self.batch):
                yield rows[index]


def bench_batches(bench: Bench) -> None:
    """Shuffled batches of 4,096 tokens, warm: torchdata's StatefulDataLoader, and TokenStream."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        print("batches_vs_dataloader: skipped, torchdata is not installed (pip install 'granary-sae[bench]')")
        return
    store = bench.store()
    batch, group = 4096, 8

    def loader(workers: int) -> Callable[[], float]:
        def run() -> float:
            made = StatefulDataLoader(Shuffled(store.url, group, batch), batch_size=None, num_workers=workers)
            rows = iter(made)
            return timed(lambda: [None for _ in rows])

        return run

    def ours() -> float:
        data = TrainingData([StoreSlice(store, store.contexts("all"))])
        order = StreamOrder(batch_size=batch, seed=0, lanes=8, mix_contexts=1, drop_last=True)
        with TokenStream(
            data, {HOOK: (D, torch.bfloat16)}, order, dtype=torch.bfloat16, io_threads=2, prefetch_bytes=1 << 28
        ) as stream:
            stream.stop_at(1, 0)
            return timed(lambda: [None for _ in stream])

    for workers in (0, 2):
        bench.pair(f"batches_vs_dataloader_{workers}_workers", loader(workers), ours)
    best = min(bench.ratios[f"batches_vs_dataloader_{workers}_workers"] for workers in (0, 2))
    bench.ratios["batches_vs_dataloader"] = best
    print(f"{'batches_vs_dataloader':26} {best:6.2f} (target 3.0) against the faster of the two")


MEMORY = """
import sys, torch
from shared.store import Store
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
def peak():  # not ru_maxrss: that of a new process begins at its parent's
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
hook = "layers.2.resid_post"
store = Store.open(sys.argv[1])
data = TrainingData([StoreSlice(store, store.contexts("all")[: int(sys.argv[2])])])
order = StreamOrder(batch_size=4096, seed=0, lanes=4, mix_contexts=2)
before = peak()
with TokenStream(data, {hook: (4096, torch.bfloat16)}, order, prefetch_bytes=1 << 27, io_threads=2) as stream:
    stream.stop_at(1, 0)
    for batch in stream:
        pass
    print(peak() - before, stream.buffer_bytes)
"""


def bench_memory(bench: Bench) -> None:
    """Growth of a reading process's peak memory against its stated budget, for stores of different size."""
    store = bench.store()
    found = []
    for share in (2, 1):
        contexts = bench.plan.num_contexts // share
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, store.url, str(contexts)], capture_output=True, text=True, check=True
        )
        growth, budget = map(int, done.stdout.split())
        batch = 4096 * D * (4 + 2)  # the batch handed out as float32, and the bfloat16 it is gathered in
        found.append({"store_gb": contexts * bench.seq_len * D * 2 / 1e9, "grown_mb": growth / 1e6,
                      "budget_mb": (budget + batch) / 1e6, "of_budget": growth / (budget + batch)})  # fmt: skip
        print("memory", {key: round(value, 3) for key, value in found[-1].items()}, flush=True)
    bench.details["memory"] = found
    bench.ratios["memory_of_budget"] = round(max(entry["of_budget"] for entry in found), 3)


PARTS = {
    "write": bench_write, "read": bench_read, "cold": bench_cold, "int8": bench_int8, "zarr": bench_zarr,
    "batches": bench_batches, "memory": bench_memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.3 GB instead of 2.1, 3 pairs instead of 5")
    parser.add_argument(
        "--folder", type=Path, help="where to work (the disk that is measured); default: a temporary one"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--pairs", type=int)
    options = parser.parse_args()
    shards, seq_len, pairs = (2, 2048, 3) if options.quick else (8, T, 5)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="granary-bench-") as folder:
        bench = Bench(Path(folder), shards, options.pairs or pairs, seq_len)
        for name in options.only.split(","):
            PARTS[name](bench)
    bench.details["seconds"] = round(time.perf_counter() - begin, 1)
    bench.details["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print_result({"ratios": bench.ratios, "details": bench.details})


if __name__ == "__main__":
    main()
