"""``python -m stage_train.plan d_model=4096 nproc=8 sae.k=64 ...``: what the run with these overrides will need."""

import sys
from collections.abc import Sequence
from contextlib import suppress

import stage_train.config
from shared.basics.display import refuse_password, shown
from shared.basics.errors import GranaryError
from shared.basics.field_docs import docs
from shared.launch.commands import program
from shared.launch.compose import composed
from shared.launch.outcome import ending_in_one_line
from stage_train.plan.config import OWN, PlanSchema

HELP = """\
usage: {program} key=value ...

What the training run with these overrides will need, on every rank: memory, reading, time. Nothing is
trained or written. Beside training's own keys:

{options}"""
# Tried in this order where a plan does not fit, after smaller micro-batches.
HALF, LATENT, FSDP = "optim.moments=bfloat16", "parallel.layout=latent", "parallel.layout=fsdp"
ALTERNATIVES = ([HALF], [LATENT], [FSDP], [LATENT, HALF])
MICRO_BATCHES = [1 << power for power in range(16, 6, -1)]


def planned(overrides: Sequence[str]) -> PlanSchema:
    """Compose the configuration as ``python -m stage_train`` does; what is for Hydra alone says nothing about a run."""
    stage_train.config.register(PlanSchema)
    given = [one for one in overrides if not one.startswith("hydra")]
    # Hydra's own node, which names the output folder, is not there: nothing is written.
    filled: PlanSchema = composed("train", ["out_dir=${run_dir}/sae", *given])
    return filled


def main() -> None:
    """Print the plan; status 2 and one line on stderr when a rank's memory is not enough or the run makes no sense."""
    if {"--help", "-h"} & set(sys.argv):
        told = docs(PlanSchema)
        options = (f"  {name:<15} {told[name]} [{getattr(PlanSchema, name)}]" for name in told if name in OWN)
        print(HELP.format(program=program("plan"), options="\n".join(options)))  # noqa: T201
        return
    with ending_in_one_line():
        refuse_password(*sys.argv[1:])
        cfg = planned(sys.argv[1:])
        from shared.basics.units import GIB
        from stage_train.plan.memory import find_memory
        from stage_train.plan.pace import find_pace
        from stage_train.plan.run import PlannedRun
        from stage_train.show.plan import as_json, table

        run = PlannedRun(cfg)
        base = run.base()
        beside = base.blocks if base else {}
        memory = find_memory(run).beside(beside)
        print(shown((as_json if cfg.json else table)(run, memory, find_pace(run, memory.flop), base)))  # noqa: T201
        most, advice = cfg.memory_gib, "take more ranks, fewer latents, or a larger memory"
        if most is None or memory.total <= most * GIB:
            return
        for changes in [*([f"optim.micro_batch={size}"] for size in MICRO_BATCHES if size < run.rows), *ALTERNATIVES]:
            with suppress(GranaryError):  # makes no sense here
                changed = PlannedRun(planned([*sys.argv[1:], *changes]), run.tokens)
                needed = find_memory(changed).beside(beside).total
                if needed <= most * GIB:
                    advice = f"{' '.join(changes)} takes {needed / GIB:.2f} GiB"
                    break
        needs = f"a rank needs {memory.total / GIB:.2f} GiB, memory_gib={most:g} (peak: {memory.peak})"
        raise GranaryError(f"{needs}: {advice}")


if __name__ == "__main__":
    main()
