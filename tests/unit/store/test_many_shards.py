"""What a store costs grows with its shards, and no faster: harvesting, resuming, reading, checking."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.store import Store
from shared.store.__main__ import main
from shared.store.format.extent import Extent
from shared.store.io.local import LocalIO
from shared.store.verify import drop_incomplete
from shared.store.window import Window
from tests.synthetic import synthetic_plan, synthetic_tokens

HOOK = "layers.2.resid_post"
FEW, TIMES = 32, 4
# 4 where each shard costs the same, 16 where each costs as much as there are.
MOST_RATIO = 4.5


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """What the block asks of storage: objects, and every entry of every listing; and what it reckons for all shards."""
    asked = [0]

    def counted(whole: Callable[..., Any], weight: Callable[[Any], int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = whole(*arguments, **options)
            asked[0] += weight(result)
            return result

        return call

    def one(result: Any) -> int:
        return 1

    with pytest.MonkeyPatch.context() as patch:
        for name in ("size", "get", "put", "read_into", "read_checked"):
            patch.setattr(LocalIO, name, counted(getattr(LocalIO, name), one))
        patch.setattr(LocalIO, "listing", counted(LocalIO.listing, len))
        patch.setattr(Extent, "heldout", property(counted(Extent.heldout.fget, one)))  # type: ignore[attr-defined]
        yield asked


def harvest(folder: Path, shards: int) -> Store:
    plan = synthetic_plan(
        num_contexts=shards, seq_len=4, d_model=2, shard_contexts=1, chunk_tokens=4, hooks={HOOK: 2}, dtype="float32"
    )
    store = Store.create(folder, plan, *synthetic_tokens(plan))
    for shard in store.pending():
        store.write_shard(shard, {HOOK: torch.zeros(1, 4, 2)})
    store.finalize()
    return store


def read(folder: Path, shards: int) -> object:
    store = Store.open(folder)
    store.statistics(HOOK)
    return store.mask(store.contexts("train")), [store.read_context(HOOK, context) for context in range(shards)]


WORK: dict[str, Callable[[Path, int], object]] = {
    "harvest": harvest,
    "resume": lambda folder, shards: Store.open(folder).pending(),
    "read": read,
    "info": lambda folder, shards: main(["info", str(folder)]),
    "ls": lambda folder, shards: main(["ls", str(folder)]),
    "verify": lambda folder, shards: main(["verify", str(folder)]),
    "drop-incomplete": lambda folder, shards: drop_incomplete(str(folder)),
}


def test_each_shard_costs_the_same(tmp_path: Path) -> None:
    counts: dict[str, list[int]] = {name: [] for name in WORK}
    for shards in (FEW, TIMES * FEW):
        for name, work in WORK.items():
            with counting() as calls, contextlib.redirect_stdout(io.StringIO()):
                work(tmp_path / str(shards), shards)
            counts[name].append(calls[0])
    assert {name: few * MOST_RATIO > many for name, (few, many) in counts.items()} == dict.fromkeys(WORK, True), counts


def test_a_window_looks_behind_the_blocks_that_it_knows(tmp_path: Path) -> None:
    plan = synthetic_plan(num_contexts=128, seq_len=8, d_model=16, shard_contexts=1, chunk_tokens=8)
    store = Store.create(tmp_path / "store", plan, *synthetic_tokens(plan), window_bytes=6000)
    window = Window.find(store.io, plan)
    assert window is not None
    blocks = window.plan.num_blocks
    assert blocks > 8
    ends = []
    with counting() as asked:
        for block in range(blocks):
            ends.append(window.open_end())
            window.release(block, list)
    assert sorted(set(ends)) == ends[: len(set(ends))]
    assert window.open_end() == store.num_shards
    assert asked[0] <= 6 * blocks
    assert np.all(np.diff(ends) >= 0)
