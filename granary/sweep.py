"""``granary sweep name=mine sae.k=8,16``: train every combination from one store, then score and compare them all.

The same as ``python -m stage_train -m ...``, and then ``python -m stage_eval`` on what that trained.
"""

import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from shared.basics.errors import GranaryError
from shared.launch.outcome import ending_in_one_line
from shared.launch.stage import run_child

HELP = """\
usage: granary sweep [key=value ...] [key=value,value ...]

Train every combination of the keys that are given several values (without any: {grid}), then compare
them. Takes what granary train takes; packed=true trains all of them from one pass over the store.
"""
GRID = ("sae.k=8,16", "sae.expansion=4,8")
# What both stages must be told alike.
SHARED = ("name", "run_dir", "store.url", "nproc", "device", "device.name", "hydra/launcher")
SHARED_GROUPS = ("hydra.launcher.",)


def commands(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of training and those of evaluation."""
    given = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    folder = "${run_dir}/sweep"
    for argument in given:
        key, _, value = argument.partition("=")
        if key == "hydra.sweep.dir":
            folder = value.strip("'\"")
    grid = [] if is_grid(given) else GRID
    return ["-m", *grid, *given], [*shared_arguments(given), f"sae.path='{folder}'", "sae.last_grid=true"]


def shared_arguments(arguments: Sequence[str]) -> list[str]:
    """Those that evaluation must be told too. Raises GranaryError, before anything is trained, for several values."""
    keys = [(argument, argument.partition("=")[0]) for argument in arguments]
    told = [(argument, key) for argument, key in keys if key in SHARED or key.startswith(SHARED_GROUPS)]
    for argument, key in told:
        if is_grid([argument]):
            raise GranaryError(
                f"{argument}: what is trained together is scored together, with one {key}: run the command "
                "once for each, with its own name="
            )
    return [argument for argument, _ in told]


def is_grid(arguments: Sequence[str]) -> bool:
    """Whether an override gives several values; what can't be parsed is for the stage to refuse."""
    try:
        parsed = OverridesParser.create().parse_overrides([one for one in arguments if not one.startswith("-")])
    except HydraException:
        return True
    return any(override.is_sweep_override() for override in parsed)


def main() -> None:
    """Run both; the first that fails ends it with its status."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP.format(grid=" ".join(GRID)), end="")  # noqa: T201
        return
    with ending_in_one_line():
        train, evaluate = commands(arguments)
        run_child([sys.executable, "-m", "stage_train", *train])
        run_child([sys.executable, "-m", "stage_eval", *evaluate])


if __name__ == "__main__":
    main()
