"""Leave out tokens whose norm is far above the median at a site that is read, exactly and before the first step.

Norms must be known before batches can be counted, so one pass at the start reads the shards whose recorded largest
norm is above the bound, and no others: mostly none. What it finds is taken out of the masks and out of the statistics;
the order of the stream stays a pure function of what is left.

Shape letters: M dropped rows, N trainable rows of a context, D width of a site.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from shared.parallel import World
from shared.store import DamagedObjectError, HookStatistics
from shared.store.buffers import empty_to_read
from stage_train.data.stores import PinnedStore, combined_statistics
from stage_train.data.stream import TrainingData

log = logging.getLogger(__name__)


@dataclass
class SiteSums:
    """Sums over dropped rows at one site, in float64."""

    total_D: NDArray[np.float64]
    squares_D: NDArray[np.float64]
    norms: float

    @classmethod
    def zero(cls, width: int) -> Self:
        """Make the sums of no rows."""
        return cls(np.zeros(width), np.zeros(width), 0.0)

    def add(self, total_D: NDArray[np.float64], squares_D: NDArray[np.float64], norms: float) -> None:
        """Count further rows by their sums."""
        self.total_D += total_D
        self.squares_D += squares_D
        self.norms += norms


@dataclass
class DroppedRows:
    """The tokens of one store above the bounds: where they are, and their sums at every site."""

    bounds: Mapping[str, float]
    """The largest norm that stays, for each site that is read."""
    places: list[tuple[int, int]]
    """(row of TrainingData, position)."""
    sums: dict[str, SiteSums]

    @classmethod
    def none(cls, bounds: Mapping[str, float], widths: Mapping[str, int]) -> Self:
        """Make the record of a store of which no row is dropped."""
        return cls(bounds, [], {site: SiteSums.zero(width) for site, width in widths.items()})

    def add(self, row: int, positions: NDArray[np.int64], rows: Mapping[str, NDArray[np.float64]]) -> None:
        """Count rows [M, D] of one context, at every site."""
        self.places += [(row, int(position)) for position in positions]
        for site, rows_M_D in rows.items():
            norms = float(np.linalg.norm(rows_M_D, axis=1).sum())
            self.sums[site].add(rows_M_D.sum(0), (rows_M_D**2).sum(0), norms)

    def merge(self, other: "DroppedRows") -> None:
        """Count another rank's rows."""
        self.places += other.places
        for site, sums in other.sums.items():
            self.sums[site].add(sums.total_D, sums.squares_D, sums.norms)

    def taken_from(self, site: str, whole: HookStatistics) -> HookStatistics:
        """The statistics of the rows that are left at a site, from those of all."""
        sums, left = self.sums[site], whole.count - len(self.places)
        if left == 0:
            raise GranaryError("stream.max_norm_multiple leaves no token of a store to train on: raise it")
        mean_D = (whole.count * whole.mean - sums.total_D) / left
        second_D = (whole.count * (whole.var + whole.mean**2) - sums.squares_D) / left
        return replace(
            whole,
            count=left,
            mean=mean_D,
            var=np.maximum(second_D - mean_D**2, 0.0),
            mean_norm=(whole.count * whole.mean_norm - sums.norms) / left,
            rms_norm=float(np.sqrt(second_D.sum())),
            max_norm=min(whole.max_norm, self.bounds.get(site, np.inf)),
        )


def norm_bounds(stores: Sequence[PinnedStore], reads: Sequence[str], multiple: float) -> dict[str, float]:
    """The largest norm that stays at each site: `multiple`, which must be positive, times its median."""
    if not multiple > 0:
        raise GranaryError(f"stream.max_norm_multiple={multiple}: it must be above 0, or null")
    bounds = {}
    for site in reads:
        parts = [part.store.statistics(site, part.measured_shards) for part in stores]
        bounds[site] = multiple * combined_statistics(stores, parts).median_norm
    return bounds


def drop_outliers(
    data: TrainingData,
    stores: Sequence[PinnedStore],
    bounds: Mapping[str, float],
    names: Sequence[str],
    world: World,
    *,
    skip_damaged: bool = False,
) -> list[DroppedRows]:
    """Take the tokens whose norm is above the bound at any site of `bounds` out of `data`; returns them, per store.

    `names` are the sites at which their sums are wanted. Every rank reads its share of the shards and learns what the
    others found. `skip_damaged` passes over contexts that cannot be read.
    """
    first_row, dropped_of = 0, []
    keep = np.full_like(data.mask_bits, 0xFF)
    for part in stores:
        rows = range(first_row, first_row + len(part.slice.contexts))
        mine = _search(data, part, bounds, names, first_row, world, skip_damaged)
        found: list[DroppedRows | None] = [mine]
        if world.size > 1:
            found = [None] * world.size
            dist.all_gather_object(found, mine)
        dropped = DroppedRows.none(bounds, {site: part.store.width(site) for site in names})
        for piece in found:
            assert piece is not None
            dropped.merge(piece)
        for row, position in dropped.places:
            keep[row, position // 8] &= 0xFF ^ (0x80 >> position % 8)
        dropped_of.append(dropped)
        log.info(
            "stream.max_norm_multiple: %d of %d tokens of %s have a norm above %s and are left out",
            len(dropped.places),
            int(data.counts[rows.start : rows.stop].sum()),
            part.store.url,
            " or ".join(f"{bound:.4g}" for bound in bounds.values()),
        )
        first_row = rows.stop
    data.restrict(keep)
    return dropped_of


def _search(
    data: TrainingData,
    part: PinnedStore,
    bounds: Mapping[str, float],
    names: Sequence[str],
    first_row: int,
    world: World,
    skip_damaged: bool,
) -> DroppedRows:
    """This rank's share of one store's outliers."""
    store = part.store
    widths = {site: store.width(site) for site in names}
    found = DroppedRows.none(bounds, widths)
    contexts = {site: empty_to_read((store.seq_len, width), store.read_dtype) for site, width in widths.items()}
    records = store.committed()
    row, suspects = first_row, []
    for shard in part.shards:
        rows = range(row, row + len(store.shard_contexts(shard)))
        if any(records[shard].norms[site].maximum > bound for site, bound in bounds.items()):
            suspects.append(rows)
        row = rows.stop
    for row in [row for rows in suspects[world.rank :: world.size] for row in rows]:
        try:
            for site, context_T_D in contexts.items():
                data.read(row, site, context_T_D)
        except DamagedObjectError:
            if not skip_damaged:
                raise
            continue  # the stream will skip it too, and say so
        positions = data.positions(row)
        index_N = torch.from_numpy(positions)
        rows_of = {site: context_T_D[index_N].double().numpy() for site, context_T_D in contexts.items()}
        above = np.any([np.linalg.norm(rows_of[site], axis=1) > bound for site, bound in bounds.items()], axis=0)
        if above.any():
            found.add(row, positions[above], {site: rows_N_D[above] for site, rows_N_D in rows_of.items()})
    return found
