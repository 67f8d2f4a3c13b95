"""Records that may belong to the result, with the activations around them, as they are found.

A record's columns are arrays of equal length; the active positions beside all peaks lie one after the other.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stage_inspect.scan.pairs import Ints, Pairs, ragged, stable_order
from stage_inspect.scan.places import Places

Columns = dict[str, npt.NDArray[Any]]

# Of a record of a window; `back` is the peak's distance from the start of its window.
WINDOW_RECORD = {"latent": np.uint32, "place": np.uint64, "back": np.uint16, "value": np.float32, "active": np.uint8}
BESIDE = {"offset": np.int8, "share": np.float16}
# Of a record of a picture: one image of one document. Beside it lies each of its regions on which the latent fires.
PICTURE_RECORD = {"latent": np.uint32, "place": np.uint64, "value": np.float32, "active": np.uint16}
REGIONS = {"image": np.int32, "row": np.int16, "col": np.int16, "share": np.float16}
TOKEN_RECORD = {"latent": np.uint32, "place": np.uint64, "token": np.int32, "next": np.int32}
# What each log holds, and in this order.
RECORDS: dict[str, dict[str, Any]] = {
    "top": WINDOW_RECORD | BESIDE,
    "sample": WINDOW_RECORD | BESIDE,
    "tokens": TOKEN_RECORD,
    "pictures": PICTURE_RECORD | REGIONS,
}


class Log:
    """Grows by batches of columns."""

    def __init__(self) -> None:
        self._parts: list[Columns] = []
        self.num_bytes = 0

    def add(self, columns: Columns) -> None:
        """A batch of records."""
        if len(columns["latent"]):
            self._parts.append(columns)
            self.num_bytes += sum(column.nbytes for column in columns.values())

    def keep(self, chosen: npt.NDArray[np.bool_]) -> None:
        """Let go of the others."""
        columns = take(self.columns(), np.flatnonzero(chosen))
        self._parts, self.num_bytes = [], 0
        self.add(columns)

    def columns(self) -> Columns:
        """All records so far, in the order they came."""
        if len(self._parts) > 1:
            whole = join(self._parts)
            self._parts = [whole]
        return self._parts[0] if self._parts else {}

    def pop(self) -> Columns:
        """`columns`, which are then its own no more."""
        columns = self.columns()
        self._parts, self.num_bytes = [], 0
        return columns


def join(parts: list[Columns]) -> Columns:
    """Batches of records one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def is_beside(name: str) -> bool:
    """Whether a column has `active` entries for each record, in place of one."""
    return name in BESIDE or name in REGIONS


def take(columns: Columns, chosen: Ints) -> Columns:
    """These records, in this order, with what belongs to them."""
    if not columns:
        return columns
    taken = {name: column[chosen] for name, column in columns.items() if not is_beside(name)}
    if "active" in columns:
        active = columns["active"].astype(np.int64)
        first = np.cumsum(active) - active
        beside = ragged(first[chosen], active[chosen])
        taken |= {name: column[beside] for name, column in columns.items() if is_beside(name)}
    return taken


def sort_by_latent(columns: Columns, num_latents: int) -> Columns:
    """Records by latent, those of one as they came."""
    if not columns:
        return columns
    return take(columns, stable_order(columns["latent"].astype(np.int64), num_latents))


def window_records(pairs: Pairs, places: Places, peak: Ints, before: int, after: int) -> Columns:
    """Records of the pairs `peak`, with the activations of the same latent from `before` to `after` each."""
    at, latent, value = pairs.at[peak], pairs.latent[peak], pairs.value[peak]
    size = len(places.place_P)
    order = pairs.latent * size + pairs.at
    low = np.maximum(at - before, places.document_P[at])
    high = np.minimum(at + after, places.document_end_P[at] - 1)
    first = np.searchsorted(order, latent * size + low)
    count = np.searchsorted(order, latent * size + high, side="right") - first
    beside = ragged(first, count)
    owner = np.repeat(np.arange(len(peak)), count)
    is_other = beside != peak[owner]
    beside, owner = beside[is_other], owner[is_other]
    own = value[owner]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(own == 0, 0, pairs.value[beside] / own)
    return {
        "latent": latent.astype(np.uint32),
        "place": places.place_P[at].astype(np.uint64),
        "back": (at - places.window_P[at]).astype(np.uint16),
        "value": value,
        "active": np.bincount(owner, minlength=len(peak)).astype(np.uint8),
        "offset": (pairs.at[beside] - at[owner]).astype(np.int8),
        "share": share.astype(np.float16),
    }


def split(columns: Columns, edges: Ints, dtypes: Mapping[str, Any]) -> list[Columns]:
    """Records sorted by latent, cut at these latents [blocks + 1]; empty columns of the dtypes where there are none."""
    if not columns:
        return [{name: np.empty(0, dtype) for name, dtype in dtypes.items()} for _ in edges[1:]]
    cuts = np.searchsorted(columns["latent"], edges)
    beside = np.append(0, np.cumsum(columns["active"], dtype=np.int64)) if "active" in columns else np.zeros(1, int)
    found = []
    for start, stop in pairwise(cuts):
        span = slice(beside[start], beside[stop]) if "active" in columns else slice(0)
        found.append(
            {name: column[span if is_beside(name) else slice(start, stop)] for name, column in columns.items()}
        )
    return found
