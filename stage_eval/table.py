"""What the terminal shows at the end."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stage_eval.compare import comparison_row
from stage_eval.report import number, percent

Report = dict[str, Any]
WIDTH = 130


def print_tables(reports: Sequence[Report]) -> None:
    """One row per SAE, and the losses that all of them are measured against."""
    console = Console()
    console.width = max(console.width, WIDTH)  # a line that wraps reads better than figures cut to "0.0..."
    hooks = list(dict.fromkeys(report["sae"]["hook"] for report in reports))
    for hook in hooks:
        here = [report for report in reports if report["sae"]["hook"] == hook]
        console.print(results_table(hook, here))
        first = here[0]
        if first["downstream"] is not None:
            console.print(
                f"  CE clean {number(first['ce_clean'], 4)}, mean-ablated {number(first['ce_mean'], 4)},"
                f" zero-ablated {number(first['ce_zero'], 4)} nats;"
                f" {first['downstream']['n_predictions']:,} predictions",
                highlight=False,
            )


def results_table(hook: str, reports: Sequence[Report]) -> Table:
    """The figures of the SAEs of one hook."""
    table = Table(title=f"{hook}: {reports[0]['n_tokens']:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("SAE", overflow="fold")
    for heading in ("k", "latents", "L0", "FVU", "cosine", "dead", "dense", "CE spliced", "recovered", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        row = comparison_row(report, None)
        table.add_row(
            row["name"],
            "-" if row["k"] is None else str(row["k"]),
            f"{row['d_latent']:,}",
            number(row["l0"]),
            number(row["fvu"], 4),
            number(row["cosine"], 4),
            percent(row["dead_fraction"]),
            percent(row["dense_fraction"]),
            number(row["ce_spliced"], 4),
            number(row["loss_recovered"], 4),
            number(row["kl"], 4),
        )
    return table
