"""Look at a store, check it, clean it: ``python -m shared.store info|ls|verify|drop-incomplete URL``.

Exit status: 0 all is well, 1 the store is damaged or incomplete, 2 the command could not be carried out.
"""

import argparse
import math
import sys

from rich.table import Table
from tqdm import tqdm

from shared.basics.units import human_bytes, spans
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from shared.store.added import AddedIO, additions
from shared.store.format.layout import FORMAT_VERSION, extent_tokens_key
from shared.store.statistics import OUTLIER_RATIO, PERCENTILES, HookStatistics
from shared.store.store import Store
from shared.store.verify import VerifyReport, drop_incomplete, verify

SHOWN_DIMENSIONS = 8


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=program("store"), description="Look at, check or clean a store.")
    commands = parser.add_subparsers(dest="command", required=True)
    help_texts = {
        "info": "what the store holds and how far its harvest is",
        "ls": "one line per shard",
        "verify": "re-read every byte and compare it with the commit records",
        "drop-incomplete": "delete leftovers of killed harvests",
    }
    for name, text in help_texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("url", help="local path or URL of a store")
        if name == "drop-incomplete":
            command.add_argument(
                "--damaged", action="store_true", help="verify first, and drop damaged shards for the next harvest too"
            )
    arguments = parser.parse_args(argv)
    status = 0
    with ending_in_one_line():
        status = run(arguments, ShownConsole(soft_wrap=True))
    return status


def run(arguments: argparse.Namespace, console: ShownConsole) -> int:
    """Carry out one command; returns the exit status."""
    if arguments.command == "info":
        return show_info(Store.open(arguments.url), console)
    if arguments.command == "ls":
        return show_shards(Store.open(arguments.url), console)
    if arguments.command == "verify":
        return show_report(verify_with_bar(arguments.url), console)
    report = verify_with_bar(arguments.url) if arguments.damaged else None
    dropped = drop_incomplete(arguments.url, report)
    for key in dropped:
        console.print(f"dropped {key}")
    console.print(f"{len(dropped)} objects dropped" if dropped else "nothing to drop")
    return 0


def show_info(store: Store, console: ShownConsole) -> int:
    """Two columns: property, value; then one line per hook."""
    records = store.committed()
    plan = store.plan
    table = Table(title=store.url, show_header=False, title_justify="left")
    contexts = sum(record.num_contexts for record in records.values())
    rows = {
        "format": f"{FORMAT_VERSION}, plan {plan.hash()[:12]}",
        "shards": f"{len(records)} of {store.num_shards} committed, {len(store.heldout_shards)} held out",
        "complete": "yes" if store.complete else "no",
        "contexts": f"{contexts:,} of {store.plan.seq_len:,} tokens each",
        "trainable tokens": f"{sum(record.num_tokens for record in records.values()):,}",
        "hooks": f"{len(store.hooks)} of d_model {', '.join(map(str, sorted(set(map(store.width, store.hooks)))))}",
        "bytes": human_bytes(sum(record.num_bytes for record in records.values())),
        "storage": f"{plan.dtype}, codec {plan.codec}, {plan.shard_contexts} contexts per shard, "
        f"{plan.chunk_rows} tokens per chunk",
        "digest": store.digest(),
    }
    passed = store.passed_shards()
    if store.window is not None:
        window = store.window.plan
        rows["window"] = (
            f"{human_bytes(window.window_bytes)}, {window.num_blocks} blocks; {len(passed)} shards passed by training "
            "and deleted"
        )
        rows["bytes"] = human_bytes(sum(record.num_bytes for s, record in records.items() if s not in passed))
    for extent in store.extents[1:]:
        rows[f"extended at shard {extent.first_shard}"] = f"{extent.plan.num_contexts:,} contexts"
    for place in additions(store.io):
        rows[f"added by {place.name}"] = addition_line(place)
    rows |= dict(flat(plan.provenance))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    hooks = Table(title="hooks (trainable positions of training shards)", title_justify="left")
    hooks.add_column("hook", no_wrap=True)
    for name in ("norm of mean", "total var", "mean norm", "median", "max", "storage error"):
        hooks.add_column(name, justify="right")
    trained = [shard for shard in records if shard not in store.heldout_shards]
    for hook in store.hooks:
        if not trained:
            hooks.add_row(hook)
            continue
        figures = store.statistics(hook, trained)
        moments = (math.sqrt((figures.mean**2).sum()), figures.var.sum())
        norms = (figures.mean_norm, figures.median_norm, figures.max_norm)
        shown = [f"{value:.4g}" for value in (*moments, *norms)]
        hooks.add_row(hook, *shown, f"{figures.relative_squared_error:.2g}")
    console.print(hooks)
    for hook in store.hooks if trained else ():
        show_norms(hook, store.statistics(hook, trained), store.seq_len, console)
    return 0


def addition_line(place: AddedIO) -> str:
    """Which sites an addition adds, and how far it is."""
    if place.size(extent_tokens_key(0)) is None:
        return "begun: its tokens are not checked yet"
    added = Store.open(place)
    state = "complete" if added.complete else f"{len(added.committed())} of {added.num_shards} shards committed"
    return f"{', '.join(added.plan.hooks)}; {state}"


def show_norms(hook: str, figures: HookStatistics, seq_len: int, console: ShownConsole) -> None:
    """Norm percentiles along the context, and the dimensions that tower over the others."""
    table = Table(title=f"{hook}: norms by position (training shards)", title_justify="left")
    for name in ("positions", "tokens", *(f"{percent} %" for percent in PERCENTILES)):
        table.add_column(name, justify="right")
    for group in figures.norms_by_position:
        last = min(group.last, seq_len - 1)
        span = str(last) if group.first == last else f"{group.first}-{last}"
        table.add_row(span, f"{group.count:,}", *(f"{value:.4g}" for value in group.percentiles.values()))
    console.print(table)
    outliers = figures.outlier_dimensions()
    shown = ", ".join(f"{dimension} ({ratio:.0f} x)" for dimension, ratio in outliers[:SHOWN_DIMENSIONS])
    more = f" and {len(outliers) - SHOWN_DIMENSIONS} more" if len(outliers) > SHOWN_DIMENSIONS else ""
    console.print(
        f"outlier dimensions (RMS at least {OUTLIER_RATIO:.0f} times the median's): {shown or 'none'}{more}\n",
    )


def flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of a JSON value as dotted names and text."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, str(value))]


def show_shards(store: Store, console: ShownConsole) -> int:
    """One line per planned shard."""
    records, passed = store.committed(), store.passed_shards()
    table = Table(title=store.url, title_justify="left")
    for name in ("shard", "contexts", "tokens", "bytes", "split", "state"):
        table.add_column(name, justify="right" if name in ("shard", "tokens", "bytes") else "left")
    for shard in range(store.num_shards):
        contexts = store.shard_contexts(shard)
        split = "heldout" if shard in store.heldout_shards else "train"
        record = records.get(shard)
        row = [str(shard), f"{contexts.start}-{contexts.stop - 1}"]
        if record is None:
            table.add_row(*row, "", "", split, "missing")
        else:
            state = "passed" if shard in passed else "committed"
            size = "" if shard in passed else human_bytes(record.num_bytes)
            table.add_row(*row, f"{record.num_tokens:,}", size, split, state)
    console.print(table)
    return 0


def verify_with_bar(url: str) -> VerifyReport:
    """`verify` with a progress bar on stderr."""
    with tqdm(total=0, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return verify(url, progress)


def show_report(report: VerifyReport, console: ShownConsole) -> int:
    """Name every bad and missing shard; returns 1 where there is one."""
    for name, part in {"": report, **report.additions}.items():
        for problem in part.problems:
            where = (f"addition {name}: " if name else "") + (f"shard {problem.shard}: " if problem.shard >= 0 else "")
            console.print(f"damaged {where}{problem.key} {problem.what}", style="red")
    damaged = sum(len(part.problems) for part in (report, *report.additions.values()))
    if report.missing:
        console.print(f"missing shards {spans(report.missing)}", style="yellow")
    for key in report.leftovers + report.uncommitted:
        console.print(f"leftover {key}")
    for key in report.foreign:
        console.print(f"not part of the store: {key}")
    if report.passed:
        console.print(f"passed by training and deleted (store.window): shards {spans(report.passed)}")
    console.print(
        f"{report.num_objects} objects, {human_bytes(report.num_bytes)} checked: "
        f"{damaged} damaged, {len(report.missing)} of {report.num_shards} shards missing",
    )
    return 0 if report.intact else 1


if __name__ == "__main__":
    sys.exit(main())
