"""The table of all latents: one column [F] per number, stored ones and those that follow from them.

The formulas of the moments are over the tokens on which the latent fired, in units of the activation as the dictionary
gives it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.latents import layout
from shared.latents.meta import Meta

Column = npt.NDArray[Any]


class Table(Mapping[str, Column]):
    """Columns by name, each [F]; ``pandas.DataFrame(dict(table))`` takes them as they are."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self._columns = columns

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def read_table(meta: Meta, latents: range, read: Callable[[str], Column | None]) -> Table:
    """Rows of these latents; `read` gives a stored column of theirs by its path, None for one that is not there."""
    columns: dict[str, Column] = {"latent": np.array(latents)}
    for path in layout.ARRAYS:
        if path.startswith("table/"):
            column = read(path)
            if column is not None:
                columns[path.removeprefix("table/")] = column
    columns["density"] = columns["fired"] / max(1, meta.counts["tokens"])
    for kind in layout.KINDS:
        if f"tokens_{kind}" in meta.counts and f"fired_{kind}" in columns:
            columns[f"{kind}_share"] = columns[f"fired_{kind}"] / np.maximum(columns["fired"], 1)
    columns |= moments(columns["fired"], [columns.pop(name) for name in layout.SUMS])
    return Table(columns)


def moments(fired: Column, sums: list[Column]) -> dict[str, Column]:
    """Mean, standard deviation, mean square, skew and excess kurtosis of the activations; 0 for a dead latent.

    `sums` are those of a, a^2, a^3 and a^4, float64 [F].
    """
    n = np.maximum(fired, 1).astype(np.float64)
    m1, m2, m3, m4 = (one / n for one in sums)
    variance = np.maximum(m2 - m1**2, 0)
    # Below this share of the mean square, the rest of the subtraction is rounding.
    is_spread = variance > 1e-12 * m2
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    safe = np.where(is_spread, variance, 1)
    return {
        "mean": m1,
        "std": np.where(is_spread, np.sqrt(variance), 0),
        "mean_square": m2,
        "skew": np.where(is_spread, third / safe**1.5, 0),
        "kurtosis": np.where(is_spread, fourth / safe**2 - 3, 0),
    }
