"""``python -m stage_train.plan d_model=4096 nproc=8 sae.k=64 ...``: what the run with these overrides will need."""

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_module

from shared.basics.display import refuse_password, shown
from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.counts import expand_counts
from shared.launch.outcome import ending_in_one_line
from shared.launch.overrides import expand_shorthands, quote_text
from shared.launch.schema import fill
from stage_train.config import TrainSchema, register
from stage_train.estimate.config import PlanSchema, help_text, split_overrides

# Tried in this order where a plan does not fit.
ALTERNATIVES = (
    ["optim.moments=bfloat16"],
    ["parallel=latent"],
    ["parallel=fsdp"],
    ["parallel=latent", "optim.moments=bfloat16"],
)
# What training imports while it runs, beside stage_train.job.
LATER_IMPORTS = ("stage_train.step.layouts.fsdp", "stage_train.step.layouts.latent")


def training_config(overrides: Sequence[str]) -> TrainSchema:
    """As ``python -m stage_train`` composes it."""
    # Hydra's own node, which names the output folder, is not there: nothing is written.
    given = expand_counts(expand_shorthands(overrides), TrainSchema)
    cfg = compose("train", overrides=["out_dir=${run_dir}/sae", *given])
    filled = fill(cfg)
    assert isinstance(filled, TrainSchema)
    return filled


def resident_bytes() -> int:
    """Memory of this process, which has imported what training imports."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0


def smaller_batches(rows: int) -> list[list[str]]:
    """Micro-batches of a half, a quarter, ... of the rows."""
    sizes = [rows >> halvings for halvings in range(1, 8)]
    return [[f"optim.micro_batch={size}"] for size in sizes if size >= 128]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan; status 2 and one line on stderr when a rank's memory is not enough or the run makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(help_text(program("plan")))  # noqa: T201
        return
    register()
    with ending_in_one_line(), initialize_config_module("conf", version_base="1.3"):
        refuse_password(*given)
        options, overrides = split_overrides(quote_text(given))
        run(options, overrides)


def run(options: PlanSchema, overrides: Sequence[str]) -> None:
    """`overrides` are training's."""
    cfg = training_config(overrides)
    from shared.basics.units import GIB
    from stage_train.estimate.job import find_data, make_job  # torch, and all that training imports
    from stage_train.estimate.memory import find_memory
    from stage_train.estimate.pace import find_pace
    from stage_train.estimate.report import Plan, as_json, table

    for name in LATER_IMPORTS:
        importlib.import_module(name)
    fixed = resident_bytes()
    data = find_data(cfg, options)
    job = make_job(cfg, options, data)
    plan = Plan(job=job, memory=find_memory(job), pace=find_pace(cfg, options, job), fixed=0 if job.cuda else fixed)
    if options.json:
        print(shown(json.dumps(as_json(plan))))  # noqa: T201
    else:
        print(shown(table(plan, options.memory_gib, options.disk_mb_s)))  # noqa: T201
    if options.memory_gib is None or plan.total <= options.memory_gib * GIB:
        return

    def bytes_with(changes: Sequence[str]) -> int | None:
        """Of the same plan with other overrides; None where they make no sense."""
        try:
            other = make_job(training_config([*overrides, *changes]), options, data)
        except GranaryError:
            return None
        return find_memory(other, start=not other.cuda).total + plan.fixed

    advice = "take more ranks, fewer latents, or a larger memory"
    for changes in [*smaller_batches(job.rows), *ALTERNATIVES]:
        needed = bytes_with(changes)
        if needed is not None and needed <= options.memory_gib * GIB:
            advice = f"{' '.join(changes)} takes {needed / GIB:.2f} GiB"
            break
    raise GranaryError(
        f"a rank needs {plan.total / GIB:.2f} GiB, memory_gib={options.memory_gib:g} "
        f"(peak: {plan.memory.peak.name}): {advice}"
    )


if __name__ == "__main__":
    main()
