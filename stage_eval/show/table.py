"""What the terminal shows at the end."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from shared.launch.terminal import ShownConsole
from stage_eval.results.evaluation import Evaluation
from stage_eval.show.text import differing, middle_cut, number, percent, small_sample

WIDE = 110
"""Columns a terminal needs for every figure; a narrower one shows the figures that decide."""


def print_tables(evaluations: Sequence[Evaluation]) -> None:
    """Print a table for each site, one row per SAE, and the losses that all of them are measured against."""
    console = ShownConsole()
    console.width = max(console.width, 80)  # a log file or a pipe has no width of its own
    hooks = list(dict.fromkeys(one.sae.hook for one in evaluations))
    for hook in hooks:
        here = [one for one in evaluations if one.sae.hook == hook]
        console.print(results_table(hook, here, wide=console.width >= WIDE))
        first = here[0]
        if first.downstream is not None:
            console.print(
                f"  CE clean {number(first.ce_clean, 4)}, mean-ablated {number(first.ce_mean, 4)},"
                f" zero-ablated {number(first.ce_zero, 4)} nats;"
                f" {first.downstream.n_predictions:,} predictions",
            )
    remark = small_sample(evaluations[0].n_tokens, evaluations[0].reconstruction.n_contexts)
    if remark:
        console.print(f"  {remark}")


def results_table(hook: str, evaluations: Sequence[Evaluation], *, wide: bool) -> Table:
    """The figures of the SAEs of one site; all of them where the terminal is `wide`."""
    table = Table(
        title=f"{hook}: {evaluations[0].n_tokens:,} tokens",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("SAE", overflow="fold")
    rows = [figures(one, wide=wide) for one in evaluations]
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    names = differing([one.sae.name for one in evaluations])
    for name, row in zip(names, rows, strict=True):
        table.add_row(middle_cut(name), *row.values())
    return table


def figures(evaluation: Evaluation, *, wide: bool) -> dict[str, str]:
    """Heading to figure of one SAE."""
    shown = {
        "k": "-" if evaluation.sae.k is None else str(evaluation.sae.k),
        "latents": f"{evaluation.latents.d_latent:,}",
        "L0": number(evaluation.l0),
        "FVU": number(evaluation.fvu, 4),
        "dead": percent(evaluation.dead_fraction),
        "recovered": number(evaluation.loss_recovered, 4),
        "KL": number(evaluation.kl, 4),
    }
    extra = {
        "cosine": number(evaluation.reconstruction.cosine, 4),
        "dense": percent(evaluation.latents.dense_fraction),
        "CE spliced": number(evaluation.ce_spliced, 4),
    }
    return shown | extra if wide else shown
