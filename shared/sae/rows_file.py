"""Rows of the matrices in a safetensors file, read when they are asked for: nothing else of it enters memory.

A mapped file would count with every page that a row lies on and those around it; these are read into buffers.
"""

import os
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.basics.documents import parse_json, typed
from shared.basics.errors import GranaryError
from shared.sae.weights_file import DTYPES, read_header

_TYPES = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True, slots=True)
class _Matrix:
    dtype: torch.dtype
    rows: int
    columns: int
    start: int
    """Of its first byte in the file."""


class RowsFile:
    """The matrices of one safetensors file, by name; a tensor of more axes counts as rows of all but the first."""

    def __init__(self, path: Path) -> None:
        """Raises GranaryError for a file that is none."""
        self.path = path
        try:
            with path.open("rb") as file:
                text = read_header(file)
                header = typed(dict[str, Any], parse_json(text[8:], "its header"), "its header")
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self._matrices = {
                name: _Matrix(
                    _TYPES[entry["dtype"]],
                    entry["shape"][0],
                    prod(entry["shape"][1:]),
                    len(text) + entry["data_offsets"][0],
                )
                for name, entry in entries.items()
                if entry["dtype"] in _TYPES and len(entry["shape"]) > 1
            }
        except (OSError, GranaryError, ValueError, KeyError, TypeError, IndexError) as error:
            raise GranaryError(f"{path} is no safetensors file that can be read ({error}): export it again") from None
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def rows(self, name: str, numbers: Tensor, columns: slice = slice(None)) -> Tensor:
        """Rows `numbers` [n] of the matrix `name`, or some of their columns, [n, width] in the file's type.

        Raises GranaryError where the file has become shorter.
        """
        matrix = self._matrices[name]
        first, last, _ = columns.indices(matrix.columns)
        size = matrix.dtype.itemsize
        held = torch.empty(len(numbers), last - first, dtype=matrix.dtype)
        for row, number in zip(held.view(torch.uint8).numpy(), numbers.tolist(), strict=True):
            if not 0 <= number < matrix.rows:
                raise IndexError(f"{name} has {matrix.rows} rows, not {number}")
            at = matrix.start + (number * matrix.columns + first) * size
            if os.preadv(self._file, [row], at) != len(row):
                raise GranaryError(f"{self.path} ends in the middle of {name}: was it written anew? Export it again")
        return held
