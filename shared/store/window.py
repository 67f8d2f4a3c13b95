"""A store larger than its disk: a harvest that runs ahead of one training run by at most a window.

The shards are cut into consecutive blocks, two of which fit the window. Training reads block after block, each shuffled
in itself; when its checkpoint has passed a block it deletes that block's activations, and only then may the harvest
write the block after the next. Which shard is in which block is a pure function of (plan, window), so the order of the
stream never depends on who was faster.

What is kept of a block that is passed: commit records, statistics, tokens, and held-out shards, which are in no block's
account. Its objects, under ``window/``:

    plan.json               the window and the blocks; put when the store is made
    reader.json             the one training run that reads the store
    passed/{block}.json     training will never read that block again: its activations may be deleted
    freed/{block}.json      they have been: the harvest may write the block after the next
    finished.json           training has ended: there is nothing to run ahead of

Every object is put before what depends on it, and each step may be repeated: a process killed anywhere goes on. So does
a training whose store is gone: it passes the blocks that it has read before, and the harvest of the same store leaves
them out.
"""

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Self

from shared.basics.errors import GranaryError
from shared.store.capacity import shard_bytes
from shared.store.format.layout import StorePlan, is_moments
from shared.store.format.manifest import DamagedObjectError, ShardRecord, reading, seal, unseal
from shared.store.io.base import ObjectIO

FOLDER = "window"
PLAN, READER, FINISHED = f"{FOLDER}/plan.json", f"{FOLDER}/reader.json", f"{FOLDER}/finished.json"
PASSED, FREED = f"{FOLDER}/passed", f"{FOLDER}/freed"
BLOCKS_IN_WINDOW = 2  # one that training reads, one that the harvest fills


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The window and the blocks it makes of a store's shards."""

    window_bytes: int
    ends: tuple[int, ...]
    """The shard behind the last one of each block."""

    @classmethod
    def of(cls, plan: StorePlan, window_bytes: int) -> Self:
        """Cut the store into as few, as equal blocks as let two fit; raises GranaryError for too small a window."""
        size = shard_bytes(plan)
        most = window_bytes // (BLOCKS_IN_WINDOW * size)
        if most < 1:
            raise GranaryError(
                f"store.window of {window_bytes:,} bytes is too small: it must hold {BLOCKS_IN_WINDOW} shards of "
                f"{size:,} bytes; raise it or lower store.shard_contexts"
            )
        heldout = set(plan.heldout_shards)
        train = [shard for shard in range(plan.num_shards) if shard not in heldout]
        count = -(-len(train) // most)
        firsts = [train[len(train) * block // count] for block in range(1, count)]
        return cls(window_bytes, (*firsts, plan.num_shards))

    @property
    def num_blocks(self) -> int:
        return len(self.ends)

    def shards(self, block: int) -> range:
        """All shards of a block, those held out included."""
        return range(self.ends[block - 1] if block else 0, self.ends[block])

    def to_bytes(self) -> bytes:
        return seal({"window_bytes": self.window_bytes, "ends": list(self.ends)})

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Self:
        """Raises DamagedObjectError."""
        with reading(key):
            record = unseal(data, key)
            plan = cls(record["window_bytes"], tuple(record["ends"]))
            if sorted(set(plan.ends)) != list(plan.ends) or plan.ends[0] < 1:
                raise ValueError(f"the ends of its blocks are {plan.ends}")
            return plan


def mark_key(folder: str, block: int) -> str:
    """Key of a block's mark in `PASSED` or `FREED`."""
    return f"{folder}/{block:08d}.json"


def mark_bytes(block: int) -> bytes:
    """Content of a mark."""
    return seal({"block": block})


class Window:
    """The window of one store, as both sides see it. Every look is a fresh one."""

    def __init__(self, io: ObjectIO, plan: WindowPlan) -> None:
        self.io = io
        self.plan = plan
        self._in_a_row = {PASSED: 0, FREED: 0}

    @classmethod
    def settle(cls, io: ObjectIO, plan: StorePlan, window_bytes: int | None, *, fresh: bool) -> "Window | None":
        """Put the window of a store that is being made (`fresh`), or compare it with the one it was made with."""
        if fresh and window_bytes is not None:
            io.put(PLAN, [WindowPlan.of(plan, window_bytes).to_bytes()])
        found = cls.find(io, plan)
        existing = None if found is None else found.plan.window_bytes
        if existing != window_bytes:
            names = ["null" if value is None else f"{value:,} bytes" for value in (existing, window_bytes)]
            raise GranaryError(
                f"{io.url} was begun with store.window of {names[0]}, not {names[1]}: use the same, or another url"
            )
        return found

    @classmethod
    def find(cls, io: ObjectIO, plan: StorePlan) -> "Window | None":
        """The window of the store of `plan` behind `io`; None where it has none.

        Raises DamagedObjectError for blocks that are not all of the store's shards.
        """
        if io.size(PLAN) is None:
            return None
        found = WindowPlan.from_bytes(io.get(PLAN), PLAN)
        if found.ends[-1] != plan.num_shards:
            raise DamagedObjectError(f"{PLAN} is not of this store: it has {plan.num_shards} shards", key=PLAN)
        return cls(io, found)

    # The harvest's side

    def is_passed(self, shard: int, heldout: Set[int]) -> bool:
        """Whether training will never read a shard: a harvest that begins anew need not make it."""
        passed = min(self.passed(), self.plan.num_blocks)
        return passed > 0 and shard < self.plan.ends[passed - 1] and shard not in heldout

    def open_end(self) -> int:
        """The first shard that must not be written yet."""
        blocks = min(self._prefix(FREED) + BLOCKS_IN_WINDOW, self.plan.num_blocks)
        return self.plan.ends[blocks - 1]

    @property
    def finished(self) -> bool:
        """True where training has ended."""
        return self.io.size(FINISHED) is not None

    # The training side

    def claim(self, run: str, folder: str) -> None:
        """Become the store's one reader, or find oneself that already; raises GranaryError where another run is."""
        if not self.io.put(READER, [seal({"run": run, "folder": folder})]):
            self.check_reader(run)

    def check_reader(self, run: str) -> None:
        """Raise GranaryError where the store's one reader is another run."""
        if self.io.size(READER) is None:
            return
        data = self.io.get(READER)
        with reading(READER):
            reader = unseal(data, READER)
            other, where = reader["run"], reader["folder"]
        if other != run:
            raise GranaryError(
                f"{self.io.url} has store.window and is being read by the run in {where}: one run can read "
                f"it; harvest without a window for several, or delete {READER} there if that run is gone for good"
            )

    def passed(self) -> int:
        """Blocks that training will never read again, from the first on."""
        return self._prefix(PASSED)

    def passed_shards(self, heldout: Set[int]) -> frozenset[int]:
        """The training shards of the passed blocks: their activations need not be there."""
        blocks = [self.plan.shards(block) for block in range(min(self.passed(), self.plan.num_blocks))]
        return frozenset(shard for block in blocks for shard in block) - heldout

    def release(self, block: int, records: Callable[[], Iterable[ShardRecord]]) -> None:
        """Delete the activations of a passed block; `records` looks for the commit records of its training shards.

        It is asked when the mark is put: who commits a shard afterwards sees the mark, and deletes what it wrote.
        """
        self.io.put(mark_key(PASSED, block), [mark_bytes(block)])
        for record in records():
            self.drop(record)
        self.io.put(mark_key(FREED, block), [mark_bytes(block)])

    def drop(self, record: ShardRecord) -> None:
        """Delete the activations of a shard that training has passed."""
        for key in data_keys(record):
            self.io.delete(key)

    def is_freed(self, block: int) -> bool:
        return self.io.size(mark_key(FREED, block)) is not None

    def finish(self) -> None:
        """Say that training has ended."""
        self.io.put(FINISHED, [seal({})])

    def _prefix(self, folder: str) -> int:
        """Marks in a row, from block 0 on; one that is there stays, so a later look begins behind it."""
        while self.io.size(mark_key(folder, self._in_a_row[folder])) is not None:
            self._in_a_row[folder] += 1
        return self._in_a_row[folder]


def data_keys(record: ShardRecord) -> list[str]:
    """The large objects of a shard: activations and scales, not its statistics."""
    return [array.key for path, array in record.arrays.items() if not is_moments(path)]


def object_check(key: str, data: bytes) -> str | None:
    """What is wrong with an object under ``window/``, for `verify`; None where nothing is."""
    try:
        if key == PLAN:
            WindowPlan.from_bytes(data, key)
        elif key in (READER, FINISHED):
            unseal(data, key)
        elif data != mark_bytes(int(key.rpartition("/")[2].removesuffix(".json"))):
            return "is not the mark of its block"
    except (DamagedObjectError, ValueError) as error:
        return str(error)
    return None


def is_window_key(key: str) -> bool:
    """True for the keys of this module."""
    return key in (PLAN, READER, FINISHED) or re.fullmatch(rf"{FOLDER}/(passed|freed)/\d{{8}}\.json", key) is not None
