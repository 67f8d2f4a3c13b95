"""What a training run may read, frozen at its start: stores, their committed contexts, their trainable positions.

A harvest may still be running; shards committed later do not change a run that has begun. Rows of TrainingData number
the contexts of all its stores in one sequence, and the masks are held as one bit per position (2.5 GB for 20 B tokens).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from stage_train.data.stream.documents import Documents
from stage_train.data.stream.permutation import Purpose, random_order
from stage_train.data.stream.slices import StoreSlice, mask_bits


class Blocks(Protocol):
    """A single store that is read once, block after block, while its harvest still runs."""

    @property
    def firsts(self) -> NDArray[np.int64]:
        """First context of every block, then the end of the last."""

    def ready(self, block: int) -> bool:
        """Whether a block can be read now."""

    def wait(self, block: int) -> None:
        """Wait until a block can be read."""


class TrainingData:
    """The trainable tokens of one or several stores."""

    def __init__(self, slices: Sequence[StoreSlice], blocks: Blocks | None = None) -> None:
        """Reads all masks. Raises GranaryError when the stores disagree on their length or hold nothing to train on.

        With `blocks`, what is called an epoch is one of them, and there are no more epochs than blocks.
        """
        self.slices = list(slices)
        self.blocks = blocks
        lengths = {part.store.seq_len for part in self.slices}
        if len(lengths) != 1:
            raise GranaryError(f"the stores have different context lengths {sorted(lengths)}: train on one length")
        (self.seq_len,) = lengths
        self._first_row = np.cumsum([0, *(len(part.contexts) for part in self.slices)])
        packed = [mask_bits(part) for part in self.slices]
        self.mask_bits: NDArray[np.uint8] = np.concatenate(packed)
        if not self.num_tokens:
            raise GranaryError("the store holds no committed token to train on: harvest first, or wait for a shard")

    @property
    def num_contexts(self) -> int:
        """Contexts of all stores."""
        return int(self._first_row[-1])

    @property
    def num_tokens(self) -> int:
        """Trainable tokens of all stores, each counted once."""
        return int(self.counts.sum())

    @property
    def read_positions(self) -> int:
        """Positions that are read in an epoch: of every context with a trainable token, as contexts are read whole."""
        return int(np.count_nonzero(self.counts)) * self.seq_len

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Trainable tokens of every context, int64 [C]."""
        return np.asarray(np.bitwise_count(self.mask_bits).sum(axis=1), np.int64)

    @cached_property
    def documents(self) -> Documents:
        """Which document each position belongs to; read when it is first asked for."""
        return Documents(self.slices, self.seq_len)

    def restrict(self, keep: NDArray[np.uint8], key: str = "stream.max_norm_multiple") -> None:
        """Drop the positions whose bit is not set in `keep`, packed as mask_bits is, as a `key` wants it."""
        self.mask_bits &= keep
        self.__dict__.pop("counts", None)
        if not self.num_tokens:
            remedy = "name others" if key == "stream.kinds" else "raise it"
            raise GranaryError(f"{key} leaves no token to train on: {remedy}")

    def positions(self, row: int) -> NDArray[np.int64]:
        """The trainable positions of a context, ascending."""
        return np.flatnonzero(self.mask_of(row))

    def mask_of(self, rows: int | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each position of a context is trainable, bool [T], or of some, [n, T]."""
        return np.unpackbits(self.mask_bits[rows], axis=-1, count=self.seq_len).view(np.bool_)

    def read(self, row: int, site: str, out: torch.Tensor) -> None:
        """Read a context's activations into `out` [T, d]. Raises GranaryError naming a torn shard."""
        part, context = self.locate(row)
        part.store.read_context(site, context, out=out)

    def locate(self, row: int) -> tuple[StoreSlice, int]:
        """The slice and the context number there of a row."""
        which = int(np.searchsorted(self._first_row, row, side="right")) - 1
        part = self.slices[which]
        return part, int(part.contexts[row - self._first_row[which]])

    def rows_of_epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The rows an epoch reads, sorted: a row once per whole unit of its store's weight.

        Contexts without a trainable token are left out, so that every lane has something to give. With blocks, the
        rows of block number `epoch`; none beyond the last.
        """
        if self.blocks is not None:
            first, last = (self._block_row(block) for block in (epoch, epoch + 1))
            return first + np.flatnonzero(self.counts[first:last])
        chosen = []
        for index, part in enumerate(self.slices):
            rows = np.arange(self._first_row[index], self._first_row[index + 1])
            rows = rows[self.counts[rows] > 0]
            whole, fraction = divmod(part.weight, 1.0)
            chosen += [rows] * int(whole)
            if fraction:
                order = random_order(len(rows), Purpose.SUBSET, seed, epoch, index)
                chosen.append(rows[order[: round(fraction * len(rows))]])
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)

    @property
    def epochs_alike(self) -> bool:
        """Whether every epoch reads the same rows; only their order differs then."""
        return self.blocks is None and all(float(part.weight).is_integer() for part in self.slices)

    def _block_row(self, block: int) -> int:
        assert self.blocks is not None
        firsts = self.blocks.firsts
        return int(np.searchsorted(self.slices[0].contexts, firsts[min(block, len(firsts) - 1)]))

    @property
    def num_blocks(self) -> int | None:
        """Epochs there are; None where the data can be read again and again."""
        return None if self.blocks is None else len(self.blocks.firsts) - 1

    def fewest_contexts(self, seed: int) -> int:
        """Contexts that every epoch reads at least."""
        return min(len(self.rows_of_epoch(seed, epoch)) for epoch in range(self.num_blocks or 1))
