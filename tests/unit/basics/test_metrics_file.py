"""Metrics of runs that were long, torn, or not ours."""

import json
import tracemalloc
from pathlib import Path

from shared.basics.metrics_file import lines_up_to, read_columns
from stage_train.show.curves import MOST_POINTS, PANELS, draw_curves


def test_columns_hold_the_lines_in_which_all_are_numbers(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tokens": 10, "fvu": 0.5},
        {"step": 2, "tokens": 20},
        {"step": 3, "tokens": 30, "fvu": "0.4"},
        {"step": 4, "tokens": 40, "fvu": float("nan")},
        {"step": 5, "tokens": 10**400, "fvu": 0.3},
        {"step": 6, "tokens": [60], "fvu": 0.3},
        {"step": True, "tokens": 65, "fvu": 0.3},
        {"step": 7, "tokens": 70, "fvu": 0.2},
    ]
    text = "\n".join([*map(json.dumps, lines), "[" * 100_000, '{"step": 8, "tok'])
    (tmp_path / "metrics.jsonl").write_text(text)
    columns = read_columns(tmp_path, ["tokens", "fvu"])
    assert {name: column.tolist() for name, column in columns.items()} == {"tokens": [10, 70], "fvu": [0.5, 0.2]}
    assert list(lines_up_to(tmp_path, 3)) == [json.dumps(line).encode() for line in lines[:3]]
    assert read_columns(tmp_path / "none", ["a"])["a"].tolist() == []


def test_a_long_run_is_drawn_from_a_few_points_and_in_little_memory(tmp_path: Path) -> None:
    count = 2 * MOST_POINTS
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(count):
            file.write(json.dumps({"step": step, "tokens": 64 * step} | dict.fromkeys(PANELS, 0.5)) + "\n")
    tracemalloc.start()
    columns = read_columns(tmp_path, ["tokens", *PANELS])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(columns["fvu"]) == count
    assert peak < 2 * 8 * count * (1 + len(PANELS))
    assert draw_curves(tmp_path) is not None


def test_metrics_that_are_not_ours_draw_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": {}}\n{"step": 2}\n{"step": 3, "loss": "x"}\n')
    assert draw_curves(tmp_path) is None
