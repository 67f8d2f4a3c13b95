"""What a store costs grows with its shards, and no faster: harvesting, resuming, reading, checking."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.store import Store, StorePlan
from shared.store.__main__ import main
from shared.store.format import integrity, layout
from shared.store.format.extent import Extent
from shared.store.format.integrity import check_array_object
from shared.store.io.local import LocalIO
from shared.store.verify import drop_incomplete, verify
from shared.store.window import Window
from tests.synthetic import synthetic_plan, synthetic_store, synthetic_tokens

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


@contextlib.contextmanager
def calls_of(kind: type, name: str) -> Iterator[list[Any]]:
    """The arguments of every call of a method within the block."""
    whole, seen = getattr(kind, name), list[Any]()

    def call(self: Any, *arguments: Any) -> Any:
        seen.append(arguments)
        return whole(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, call)
        yield seen


def test_contexts_and_chunks_cost_nothing_by_themselves(tmp_path: Path) -> None:
    shards, contexts = 3, 40
    plan = synthetic_plan(num_contexts=shards * contexts, seq_len=8, d_model=2, shard_contexts=contexts, chunk_tokens=2)
    store = synthetic_store(tmp_path / "store", plan)
    with calls_of(StorePlan, "identity") as asked:  # of a corpus of many files it is long
        assert len(Store.open(tmp_path / "store").committed()) == shards
    assert len(asked) <= 1
    with calls_of(Store, "shard_of") as asked, calls_of(LocalIO, "read_into") as reads:
        store.mask(range(shards * contexts))
    assert (len(asked), len(reads)) == (2 * shards, shards)
    with calls_of(LocalIO, "read_into") as reads:
        assert verify(str(tmp_path / "store")).intact
    chunks = [key for key, *_ in reads if "/c/" in key and key.startswith("layers/")]
    assert len(chunks) == 2 * shards  # all chunks of a shard at once, and its index


def test_a_damaged_chunk_is_named_wherever_reads_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic_store(tmp_path / "store", synthetic_plan(num_contexts=8, seq_len=8, d_model=2, chunk_tokens=2))
    (array,) = [one for path, one in store.committed()[0].arrays.items() if not layout.is_moments(path)]
    slots, size = len(array.chunk_bytes), int(array.chunk_bytes[0])
    whole = (tmp_path / "store" / array.key).read_bytes()
    for read_bytes in (1, size, 3 * size - 1, 3 * size, 1 << 20):
        monkeypatch.setattr(integrity, "READ_BYTES", read_bytes)
        for chunk in range(slots):
            torn = bytearray(whole)
            torn[chunk * size + 1] ^= 1
            (tmp_path / "store" / array.key).write_bytes(torn)
            assert check_array_object(store.io, array, slots) == f"fails its checksum in chunk {chunk}"
        (tmp_path / "store" / array.key).write_bytes(whole)
        assert check_array_object(store.io, array, slots) is None


def test_token_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    plan = synthetic_plan(num_contexts=10, seq_len=8, d_model=2, chunk_tokens=8)
    store = synthetic_store(tmp_path / "store", plan)
    tokens, mask, segments = synthetic_tokens(plan)
    for contexts in ([], [9, 0, 0, 2, 7, 2], np.array([3, 3, 1], np.int32), range(10)):
        chosen = np.array(contexts, int)
        assert np.array_equal(store.tokens(contexts), tokens[chosen])
        assert np.array_equal(store.mask(contexts), mask[chosen])
        assert np.array_equal(store.segments(contexts), segments[chosen])
    for wrong in ([0, 10], [-1, 0], np.array([3, 12])):
        with pytest.raises(GranaryError, match=r"context (10|-1|12) is not in the store"):
            store.tokens(wrong)


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
