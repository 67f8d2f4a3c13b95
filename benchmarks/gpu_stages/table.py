"""The results as Markdown: what failed first, then the steps against the floor. Imports nothing that could fail."""

import json
from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]
PREDICTED = {"a": "2.6 to 3.3", "b": "1.9 to 2.3"}
"""Times the floor on an H100, from the counts of docs/kernels_measured.md, written down before any measurement."""


def table(lines: Sequence[Line]) -> str:
    """The floor is the encoder's product, 2 N F d over the rate that stage ``machine`` measured."""
    by_name = {line["name"]: line for line in lines}
    rate = by_name.get("product", {}).get("tflops")
    versions = {key: value for key, value in by_name.get("versions", {}).items() if key not in ("stage", "name")}
    checks = [line for line in lines if "ok" in line and line["name"] != "stage"]
    wrong = [line for line in checks if not line["ok"]]
    text = [
        "# The sparse step on a GPU",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        *(["", "A rehearsal: no figure means anything.", ""] if versions.get("device") == "rehearsal" else []),
        f"bfloat16 product {rate} TFLOP/s, copy {by_name.get('copy', {}).get('tb_per_s')} TB/s",
        "",
        f"{len(checks) - len(wrong)} of {len(checks)} checks passed.",
        *(f"- FAILED {json.dumps(line)}" for line in wrong),
    ]
    text += _section("step | ms | floor ms | x floor | predicted | tokens/s | above state GB", _steps(lines, rate))
    parts = (line for line in lines if line["name"].startswith("part "))
    text += _section("part | shape | ms", (f"{p['name'][5:]} | {p['shape']} | {p['ms']:.3f}" for p in parts))
    loads = (line for line in lines if line["name"].partition(" ")[0] in ("load", "staging,", "store"))
    text += _section("published load | result", (f"{line['name']} | {_rest(line)}" for line in loads))
    probes = (line for line in lines if line["name"].startswith("probe "))
    text += _section("probe | result", (f"{p['name'][6:]} | {_rest(p)}" for p in probes))
    stages = (line for line in lines if line["name"] == "stage")
    rows = (f"{s['stage']} | {s['attempt']} | {s['status']} {s['end']} | {s['seconds']}" for s in stages)
    return "\n".join(text + _section("stage | attempt | status | seconds", rows)) + "\n"


def _section(head: str, rows: Any) -> list[str]:
    return ["", f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows)]


def _steps(lines: Sequence[Line], rate: float | None) -> list[str]:
    rows = []
    for line in lines:
        if line["name"].startswith("step, "):
            d, latents, _, batch = (int(part[1:]) for part in line["shape"].split("_"))
            floor = 2 * batch * latents * d / (rate * 1e9) if rate else float("nan")
            predicted = PREDICTED.get(line["stage"].removeprefix("step "), "-")
            rows.append(
                f"{line['shape']} {line['name'][6:]} | {line['ms']:.2f} | {floor:.2f} | {line['ms'] / floor:.2f} | "
                f"{predicted} | {line['tokens_per_s']:,.0f} | {line['above_state_gb']:.2f}"
            )
    return rows


def _rest(line: Line) -> str:
    return json.dumps({key: value for key, value in line.items() if key not in ("stage", "name")})
