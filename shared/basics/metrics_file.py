"""Reading ``metrics.jsonl``: one JSON object per logging step of a training run."""

import json
from pathlib import Path
from typing import Any

from shared.basics.run_folder import RunFolder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines in a run's folder, without a last one that a kill cut short; empty without the file."""
    path = RunFolder(folder).metrics
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
