"""What the terminal shows at the end."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stage_eval.show.compare import comparison_row
from stage_eval.show.report import number, percent

Report = dict[str, Any]
WIDE = 110
"""Columns a terminal needs for every figure; a narrower one shows the figures that decide."""


def print_tables(reports: Sequence[Report]) -> None:
    """One row per SAE, and the losses that all of them are measured against."""
    console = Console()
    console.width = max(console.width, 80)  # a log file or a pipe has no width of its own
    hooks = list(dict.fromkeys(report["sae"]["hook"] for report in reports))
    for hook in hooks:
        here = [report for report in reports if report["sae"]["hook"] == hook]
        console.print(results_table(hook, here, wide=console.width >= WIDE))
        first = here[0]
        if first["downstream"] is not None:
            console.print(
                f"  CE clean {number(first['ce_clean'], 4)}, mean-ablated {number(first['ce_mean'], 4)},"
                f" zero-ablated {number(first['ce_zero'], 4)} nats;"
                f" {first['downstream']['n_predictions']:,} predictions",
                highlight=False,
            )


def results_table(hook: str, reports: Sequence[Report], *, wide: bool) -> Table:
    """The figures of the SAEs of one hook; all of them where the terminal is `wide`."""
    table = Table(
        title=f"{hook}: {reports[0]['n_tokens']:,} tokens", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("SAE", overflow="fold")
    rows = [figures(report, wide=wide) for report in reports]
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    for report, row in zip(reports, rows, strict=True):
        table.add_row(comparison_row(report, None)["name"], *row.values())
    return table


def figures(report: Report, *, wide: bool) -> dict[str, str]:
    """Heading to figure of one SAE."""
    row = comparison_row(report, None)
    shown = {
        "k": "-" if row["k"] is None else str(row["k"]),
        "latents": f"{row['d_latent']:,}",
        "L0": number(row["l0"]),
        "FVU": number(row["fvu"], 4),
        "dead": percent(row["dead_fraction"]),
        "recovered": number(row["loss_recovered"], 4),
        "KL": number(row["kl"], 4),
    }
    extra = {
        "cosine": number(row["cosine"], 4),
        "dense": percent(row["dense_fraction"]),
        "CE spliced": number(row["ce_spliced"], 4),
    }
    return shown | extra if wide else shown
