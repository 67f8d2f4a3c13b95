"""What the terminal shows at the end."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from shared.launch.terminal import ShownConsole
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.figures import Downstream, JointDownstream
from stage_eval.results.supervised import SupervisedOutline
from stage_eval.show.supervised import SUPERVISED_HEADINGS, headline_figures, whole_activation
from stage_eval.show.text import differing, middle_cut, number, percent, small_sample

WIDE = 110
"""Columns a terminal needs for every figure; a narrower one shows the figures that decide."""


def print_tables(evaluations: Sequence[Evaluation], joint: JointDownstream | None = None) -> None:
    """Print a table for each site, one row per SAE, and the losses that all of them are measured against.

    Where all were spliced in at once, a single table: one row for each replaced alone, the last for all.
    """
    console = ShownConsole()
    console.width = max(console.width, 80)  # a log file or a pipe has no width of its own
    if joint is not None:
        console.print(joint_table(evaluations, joint))
    else:
        print_by_site(console, evaluations)
    remark = small_sample(evaluations[0].n_tokens, evaluations[0].reconstruction.n_contexts)
    if remark:
        console.print(f"  {remark}")


def print_by_site(console: ShownConsole, evaluations: Sequence[Evaluation]) -> None:
    """A table for each site."""
    for hook in dict.fromkeys(one.sae.hook for one in evaluations):
        here = [one for one in evaluations if one.sae.hook == hook]
        console.print(results_table(hook, here, wide=console.width >= WIDE))
        outlines = [SupervisedOutline.of(one.supervised) for one in here if one.supervised is not None]
        if outlines:
            console.print(supervised_table([one.sae.name for one in here], outlines))
        first = here[0]
        if first.downstream is not None:
            console.print(
                f"  CE clean {number(first.ce_clean, 4)}, mean-ablated {number(first.ce_mean, 4)},"
                f" zero-ablated {number(first.ce_zero, 4)} nats;"
                f" {first.downstream.n_predictions:,} predictions",
            )


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


def supervised_table(names: Sequence[str], outlines: Sequence[SupervisedOutline | None]) -> Table:
    """The headlines of the supervised scores."""
    title = f"labels of Python's tokenizer. {whole_activation(outlines)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("SAE", overflow="fold")
    for heading in SUPERVISED_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, one in zip(differing(names), outlines, strict=True):
        shown = (None if found is None else found.value for found in headline_figures(one))
        table.add_row(middle_cut(name), *map(number, shown))
    return table


def joint_table(evaluations: Sequence[Evaluation], joint: JointDownstream) -> Table:
    """One row for each dictionary replaced alone, and one for all replaced at once."""
    first = evaluations[0]
    table = Table(
        title=f"{first.n_tokens:,} tokens; CE clean {number(joint.ce_clean, 4)} nats,"
        f" all zero-ablated {number(joint.ce_zero, 4)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("replaced", no_wrap=True)
    for heading in ("L0", "FVU", "dead", "CE", "recovered", "KL", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in evaluations:
        own = (number(one.l0), number(one.fvu, 4), number(one.dead_fraction))
        assert one.downstream is not None
        table.add_row(", ".join(one.sae.writes or [one.sae.hook]), *own, *losses(one.downstream))
    total = sum(one.l0 for one in evaluations if one.l0 is not None)
    table.add_row("all at once", number(total), "", "", *losses(joint))
    return table


def losses(downstream: Downstream) -> tuple[str, ...]:
    """Cross-entropy, share recovered of what zero-ablation loses, KL to the clean model, agreement of the top token."""
    return (
        number(downstream.ce_spliced, 4),
        number(downstream.loss_recovered, 4),
        number(downstream.kl, 4),
        number(downstream.top1_agreement),
    )


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
