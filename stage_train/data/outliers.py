"""Leave out tokens whose norm is far above the median, exactly and before the first step.

Norms must be known before batches can be counted, so one pass at the start reads the shards whose recorded largest
norm is above the bound, and no others: mostly none. What it finds is taken out of the masks and out of the statistics;
the order of the stream stays a pure function of what is left.

Shape letters: M dropped rows, D d_model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from shared.parallel import World
from shared.store import DamagedObjectError, HookStatistics
from stage_train.data.stores import FrozenStore
from stage_train.data.stream import TrainingData

log = logging.getLogger(__name__)


@dataclass
class Dropped:
    """The rows of one store above the bound: where they are, and their sums in float64."""

    places: list[tuple[int, int]]
    """(row of TrainingData, position)."""
    total_D: NDArray[np.float64]
    squares_D: NDArray[np.float64]
    norms: float

    def add(self, row: int, positions: NDArray[np.int64], rows_M_D: NDArray[np.float64]) -> None:
        """Count rows of one context."""
        self.places += [(row, int(position)) for position in positions]
        self.total_D += rows_M_D.sum(0)
        self.squares_D += (rows_M_D**2).sum(0)
        self.norms += float(np.linalg.norm(rows_M_D, axis=1).sum())

    def merge(self, other: "Dropped") -> None:
        """Count another rank's rows."""
        self.places += other.places
        self.total_D += other.total_D
        self.squares_D += other.squares_D
        self.norms += other.norms

    def taken_from(self, whole: HookStatistics, bound: float) -> HookStatistics:
        """The statistics of the rows that are left."""
        left = whole.count - len(self.places)
        if left == 0:
            raise GranaryError("stream.max_norm_multiple leaves no token of a store to train on: raise it")
        mean_D = (whole.count * whole.mean - self.total_D) / left
        second_D = (whole.count * (whole.var + whole.mean**2) - self.squares_D) / left
        return replace(
            whole,
            count=left,
            mean=mean_D,
            var=np.maximum(second_D - mean_D**2, 0.0),
            mean_norm=(whole.count * whole.mean_norm - self.norms) / left,
            rms_norm=float(np.sqrt(second_D.sum())),
            max_norm=min(whole.max_norm, bound),
        )


def drop_outliers(
    data: TrainingData,
    stores: Sequence[FrozenStore],
    hook: str,
    statistics: Sequence[HookStatistics],
    bound: float,
    world: World,
    *,
    skip_damaged: bool = False,
) -> list[HookStatistics]:
    """Take the tokens whose norm is above `bound` out of `data`; returns the statistics of what is left, per store.

    Every rank reads its share of the shards and learns what the others found. `skip_damaged` passes over contexts that
    cannot be read.
    """
    first_row, left = 0, []
    keep = np.full_like(data.packed_mask, 0xFF)
    for part, whole in zip(stores, statistics, strict=True):
        mine = _search(data, part, hook, first_row, bound, world, skip_damaged)
        found: list[Dropped | None] = [mine]
        if world.size > 1:
            found = [None] * world.size
            dist.all_gather_object(found, mine)
        dropped = Dropped([], np.zeros_like(whole.mean), np.zeros_like(whole.mean), 0.0)
        for piece in found:
            assert piece is not None
            dropped.merge(piece)
        for row, position in dropped.places:
            keep[row, position // 8] &= 0xFF ^ (0x80 >> position % 8)
        left.append(dropped.taken_from(whole, bound))
        log.info(
            "stream.max_norm_multiple: %d of %d tokens of %s have a norm above %.4g and are left out",
            len(dropped.places),
            whole.count,
            part.store.url,
            bound,
        )
        first_row += len(part.source.contexts)
    data.restrict(keep)
    return left


def _search(
    data: TrainingData,
    part: FrozenStore,
    hook: str,
    first_row: int,
    bound: float,
    world: World,
    skip_damaged: bool,
) -> Dropped:
    """This rank's share of one store's outliers."""
    store = part.store
    width = store.plan.hooks[hook]
    found = Dropped([], np.zeros(width), np.zeros(width), 0.0)
    context_T_D = torch.empty(store.seq_len, width, dtype=store.read_dtype)
    records = store.committed()
    row, suspects = first_row, []
    for shard in part.shards:
        rows = range(row, row + len(store.shard_contexts(shard)))
        if records[shard].norms[hook].maximum > bound:
            suspects.append(rows)
        row = rows.stop
    for row in [row for rows in suspects[world.rank :: world.size] for row in rows]:
        try:
            data.read(row, hook, context_T_D)
        except DamagedObjectError:
            if not skip_damaged:
                raise
            continue  # the stream will skip it too, and say so
        positions = data.positions(row)
        rows_N_D = context_T_D[torch.from_numpy(positions)].double().numpy()
        above = np.linalg.norm(rows_N_D, axis=1) > bound
        if above.any():
            found.add(row, positions[above], rows_N_D[above])
    return found
