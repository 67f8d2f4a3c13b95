"""``python -m stage_train.plan d_model=4096 nproc=8 sae.k=64 ...``: what the run with these overrides will need."""

import json
import resource
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

# Tried in this order where a plan does not fit: micro-batches of a half, a quarter, ... of the rows come first.
ALTERNATIVES = (
    ["optim.moments=bfloat16"],
    ["parallel=latent"],
    ["parallel=fsdp"],
    ["parallel=latent", "optim.moments=bfloat16"],
)
LEAST_ROWS = 128


def training_config(overrides: Sequence[str]) -> TrainSchema:
    """As ``python -m stage_train`` composes it."""
    # Hydra's own node, which names the output folder, is not there: nothing is written.
    given = expand_counts(expand_shorthands(overrides), TrainSchema)
    filled = fill(compose("train", overrides=["out_dir=${run_dir}/sae", *given]))
    assert isinstance(filled, TrainSchema)
    return filled


def resident_bytes() -> int:
    """Memory of this process, which has imported what training imports."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan; status 2 and one line on stderr when a rank's memory is not enough or the run makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(help_text(program("plan")))  # noqa: T201
        return
    register()
    with ending_in_one_line(), initialize_config_module("conf", version_base="1.3"):
        refuse_password(*given)
        run(*split_overrides(quote_text(given)))


def run(options: PlanSchema, overrides: Sequence[str]) -> None:
    """`overrides` are training's."""
    cfg = training_config(overrides)
    import stage_train.step.layouts.fsdp
    import stage_train.step.layouts.latent
    import stage_train.step.layouts.layers  # noqa: F401 (so that alternatives find them measured)
    from shared.basics.units import GIB
    from stage_train.estimate.data import find_data
    from stage_train.estimate.job import make_job
    from stage_train.estimate.memory import find_memory
    from stage_train.estimate.pace import find_pace
    from stage_train.estimate.report import as_json, table

    libraries = resident_bytes()
    data = find_data(cfg, options)
    job = make_job(cfg, options, data)
    memory = find_memory(job, libraries)
    pace = find_pace(options, job, memory.flop)
    text = json.dumps(as_json(job, memory, pace)) if options.json else table(job, memory, pace, options)
    print(shown(text))  # noqa: T201
    if options.memory_gib is None or memory.total <= options.memory_gib * GIB:
        return
    sizes = [job.rows >> halvings for halvings in range(1, 8)]
    advice = "take more ranks, fewer latents, or a larger memory"
    for changes in [*([f"optim.micro_batch={size}"] for size in sizes if size >= LEAST_ROWS), *ALTERNATIVES]:
        try:
            needed = find_memory(make_job(training_config([*overrides, *changes]), options, data), libraries).total
        except GranaryError:  # makes no sense here
            continue
        if needed <= options.memory_gib * GIB:
            advice = f"{' '.join(changes)} takes {needed / GIB:.2f} GiB"
            break
    raise GranaryError(
        f"a rank needs {memory.total / GIB:.2f} GiB, memory_gib={options.memory_gib:g} (peak: {memory.peak}): {advice}"
    )


if __name__ == "__main__":
    main()
