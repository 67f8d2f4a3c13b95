"""Reading ``metrics.jsonl``: one JSON object per logging step of a training run. It may be long, and it may be torn."""

import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines in a run's folder but damaged ones, such as a last one that a kill cut short; empty without a file."""
    return [metrics for metrics in map(_parse, _lines(folder)) if metrics is not None]


def read_columns(folder: Path, names: Sequence[str]) -> dict[str, "array[float]"]:
    """The values of `names` by name, of the lines in which each is a number; 8 bytes for each, however long the run."""
    columns = {name: array("d") for name in names}
    for line in _lines(folder):
        metrics = _parse(line)
        values = [] if metrics is None else [metrics.get(name) for name in names]
        if values and all(map(_is_number, values)):
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)  # type: ignore[arg-type]
    return columns


def lines_up_to(folder: Path, step: int) -> Iterator[bytes]:
    """The lines up to a step, byte for byte; damaged ones between them as they are."""
    damaged: list[bytes] = []
    for line in _lines(folder):
        metrics = _parse(line)
        if metrics is None:
            damaged.append(line)
        elif metrics["step"] <= step:
            yield from damaged
            yield line
            damaged = []


def _lines(folder: Path) -> Iterator[bytes]:
    path = RunFolder(folder).metrics
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The metrics of a line; None for a damaged one."""
    try:
        metrics = parse_json(line, "a line")
    except GranaryError:
        return None
    is_metrics = isinstance(metrics, dict) and type(metrics.get("step")) is int
    return metrics if is_metrics else None


def _is_number(value: object) -> bool:
    """Whether it can be drawn: no text, no NaN, and not too large for a float."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False
