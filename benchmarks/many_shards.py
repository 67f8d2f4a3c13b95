"""What a store costs as its shards grow in number: every step of its use, from open to verify, at four sizes.

    python benchmarks/many_shards.py            # 1,250 to 10,000 shards of 100 contexts: minutes, and 1 GB of disk
    python benchmarks/many_shards.py --quick    # 50 to 400 shards: within a minute

The contexts are tiny (8 positions of 4 features), so what is timed is the bookkeeping: files, commit records, orders.
The writer makes one shard of each store and the last ten; those between are copies with a commit record of their own,
which verify accepts. Each step opens the store anew; the exponent p of ``seconds ~ shards^p`` is a least-squares fit of
their logarithms, over all sizes: 1 is linear, below 1 a part that does not grow. The last line is one JSON object.
"""

import argparse
import cProfile
import io
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from records import print_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared.store import Store
from shared.store.format import layout
from shared.store.format.manifest import seal
from shared.store.verify import verify
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from stage_train.plan.__main__ import planned
from stage_train.plan.run import PlannedRun
from tests.synthetic import synthetic_plan, synthetic_tokens

HOOK, CONTEXTS, T, D = "layers.2.resid_post", 100, 8, 4
SIZES, QUICK_SIZES = [1250, 2500, 5000, 10_000], [50, 100, 200, 400]
ORDER = StreamOrder(batch_size=4096, seed=0, lanes=64, mix_contexts=4, drop_last=True)
LEFT = 10
ROWS = torch.randn(CONTEXTS, T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
Step = Callable[[Path], object]


def make(folder: Path) -> None:
    """A store of equal shards but for the last ones: a real one is copied, its commit record with another number.

    How many, the folder's name says. Tokens are written by the writer itself. The last `LEFT` shards are left to the
    harvest that is timed.
    """
    shards = int(folder.name)
    plan = synthetic_plan(
        num_contexts=shards * CONTEXTS, seq_len=T, d_model=D, shard_contexts=CONTEXTS, chunk_tokens=T,
        heldout_fraction=0.01, heldout_placement="spread",
    )  # fmt: skip
    tokens = synthetic_tokens(replace(plan, num_contexts=2 * CONTEXTS))
    store = Store.create(folder, plan, *(np.tile(part[:CONTEXTS], (shards, 1)) for part in tokens))
    first = store.write_shard(0, {HOOK: ROWS})
    objects = {path: store.io.get(array.key) for path, array in first.arrays.items()}
    for shard in range(1, shards - LEFT):
        keys = {path: layout.object_key(path, shard, 3) for path in objects}
        arrays = {path: replace(array, key=keys[path]) for path, array in first.arrays.items()}
        record = replace(first, shard=shard, first_context=shard * CONTEXTS, arrays=arrays)
        for key, data in [*((keys[path], data) for path, data in objects.items()),
                          (layout.manifest_key(shard), seal(record.to_json()))]:  # fmt: skip
            place = folder / key
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)


def harvest_rest(folder: Path) -> None:
    """The last shards and the totals, by the real writer: what going on with a large store costs."""
    store = Store.open(folder)
    for shard in store.pending():
        store.write_shard(shard, {HOOK: ROWS})
    store.finalize()


def training_data(folder: Path) -> TrainingData:
    """What training may read, masks and all."""
    store = Store.open(folder)
    return TrainingData([StoreSlice(store, store.contexts("train"))])


def plan_command(folder: Path) -> PlannedRun:
    """``granary plan store.url=...``, without the start of its process."""
    return PlannedRun(planned([f"store.url={folder}", "sae.k=2", f"stream.batch_size={ORDER.batch_size}"]))


def stream_order(folder: Path) -> int:
    """Every group of an epoch, in the order in which its contexts are needed."""
    with TokenStream(training_data(folder), {HOOK: (D, torch.bfloat16)}, ORDER) as stream:
        stream.stop_at(1, 0)
        return sum(1 for _ in stream._groups_in_need_order(0, 0))


def batch_at(share: float) -> Step:
    """The batch behind a share of the epoch, as a run that begins or continues there reads it first."""

    def step(folder: Path) -> int:
        with TokenStream(training_data(folder), {HOOK: (D, torch.bfloat16)}, ORDER) as stream:
            batch = int(share * stream.plan(0).num_batches)
            stream.load_state_dict({**stream.state_dict(), "batch": batch})
            return len(next(stream).activations[HOOK])

    return step


def verified(folder: Path) -> None:
    """Every object of the store, compared with its record."""
    report = verify(str(folder))
    assert report.intact, report.problems[:3]


STEPS: dict[str, Step] = {
    "open": Store.open,
    "commit records": lambda folder: Store.open(folder).committed(),
    "list held-out contexts": lambda folder: Store.open(folder).contexts("heldout"),
    "statistics": lambda folder: Store.open(folder).statistics(HOOK),
    "training data (masks)": training_data,
    "granary plan": plan_command,
    "stream order": stream_order,
    "first batch": batch_at(0.0),
    "resume in the middle": batch_at(0.5),
    "resume a harvest": lambda folder: Store.open(folder).pending(),
    "verify": verified,
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def timed(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 to 400 shards")
    parser.add_argument("--folder", type=Path, help="where the stores are made, and removed afterwards")
    parser.add_argument("--profile", choices=list(STEPS), help="also say where this step spends its time")
    options = parser.parse_args()
    sizes = QUICK_SIZES if options.quick else SIZES
    print(f"seconds at {', '.join(f'{size:,}' for size in sizes)} shards of {CONTEXTS} contexts; exponent")
    seconds: dict[str, list[float]] = {}

    def measure(name: str, step: Step) -> None:
        seconds[name] = [timed(partial(step, folder)) for folder in folders]
        shown = "".join(f"{one:9.3f}" for one in seconds[name])
        print(f"{name:24}{shown}   {exponent(sizes, seconds[name]):.2f}", flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        folders = [Path(root) / str(size) for size in sizes]
        measure("tokens and copies", make)
        measure(f"harvest of the last {LEFT}", harvest_rest)
        for name, step in STEPS.items():
            step(folders[0])  # what is imported or compiled once
            measure(name, step)
        if options.profile:
            with cProfile.Profile() as profile:
                STEPS[options.profile](folders[-1])
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(20)
            print(text.getvalue())
    exponents = {name: round(exponent(sizes, found), 2) for name, found in seconds.items()}
    rounded = {name: [round(one, 4) for one in found] for name, found in seconds.items()}
    print_result({"shards": sizes, "contexts_per_shard": CONTEXTS, "seconds": rounded, "exponent": exponents})


if __name__ == "__main__":
    main()
