"""Reading ``metrics.jsonl``: one JSON object per logging step of a training run."""

import json
from pathlib import Path
from typing import Any

from shared.basics.run_folder import RunFolder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines in a run's folder but damaged ones, such as a last one that a kill cut short; empty without a file."""
    return [metrics for metrics in map(_parse, _lines(folder)) if metrics is not None]


def lines_up_to(folder: Path, step: int) -> list[bytes]:
    """The lines up to a step, byte for byte; damaged ones between them as they are."""
    kept: list[bytes] = []
    damaged: list[bytes] = []
    for line in _lines(folder):
        metrics = _parse(line)
        if metrics is None:
            damaged.append(line)
        elif metrics["step"] <= step:
            kept += [*damaged, line]
            damaged = []
    return kept


def _lines(folder: Path) -> list[bytes]:
    path = RunFolder(folder).metrics
    return path.read_bytes().splitlines() if path.is_file() else []


def _parse(line: bytes) -> dict[str, Any] | None:
    """The metrics of a line; None for a damaged one."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None
