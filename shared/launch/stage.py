"""What the three entry points share: Hydra outside, one clear line on a wrong input, quiet secondary ranks.

``model=PATH`` is accepted beside Hydra's ``model=<group option>``: a value that names no file of the group is taken as
``model.path=PATH``.
"""

import difflib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.basics.errors import GranaryError
from shared.launch import slurm
from shared.launch.orphans import environment_of_child

# Groups whose value may also be a plain path, and the key that path belongs to.
PATH_SHORTHANDS = {"model": "model.path"}
# Keys that are lists by nature: a bare comma list is one value, and no sweep.
LISTS = ("hooks.layers", "hooks.sites")
# Logger, and a part of the message.
CHATTER = (
    ("submitit", "sacct error"),  # at each poll, where a cluster has no accounting
    # transformers imports torchao wherever it is installed, which tells of each library it has for other machines.
    ("torchao", "Failed to load"),
    ("torch.utils._pytree", "is an Enum subclass"),
    ("bitsandbytes.autograd._functions", "inputs will be cast"),  # at each product of bnb_int8: docs/harvest.md says so
    ("bitsandbytes.backends.cpu.ops", "kernels-community"),  # faster CPU kernels that could be downloaded
)


def run_stage(task: Callable[[Any], None], config_name: str, afterwards: Callable[[], None] = lambda: None) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line, and call `task` with the filled schema object.

    In a sweep that is once per job; `afterwards` is called when all are done. A packed job (``packed=true``) is not
    started in processes of its own: its task only takes note of it.

    Exits with status 2 and one line on stderr for a wrong configuration or a GranaryError, 130 on Ctrl-C.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the line below is ours and not Hydra's multi-line one
    os.environ.update(slurm.CHOICE_OF_WARNING)
    drop_chatter()
    sys.argv[1:] = expand_launcher(expand_shorthands(sys.argv[1:])) + rank_overrides()

    def run(cfg: DictConfig) -> None:
        if slurm.in_submitted_job():
            slurm.supervise(child_command(f"stage_{config_name}", cfg.nproc, slurm.rendezvous()))
            return
        if cfg.nproc > 1 and "RANK" not in os.environ and not cfg.get("packed", False):
            run_child(child_command(f"stage_{config_name}", cfg.nproc, ["--standalone"]))
            return
        try:
            task(OmegaConf.to_object(cfg))
        except GranaryError as error:
            fail(str(error))  # here: on its way out Hydra would add a line of its own

    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)(run)()
        afterwards()
    except GranaryError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(describe_config_error(error))
    except Exception as error:
        if not is_failed_job(error):
            raise
        fail(f"a Slurm job failed: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        submitted = any(argument.startswith("hydra/launcher=") for argument in sys.argv)
        what = "its jobs stay in the queue (squeue, scancel)" if submitted else "run the same command again to continue"
        print(f"interrupted; {what}", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def drop_chatter() -> None:
    """Leave out what libraries log that is not about the user's run; a warning of any other text still shows."""
    for logger, text in CHATTER:
        logging.getLogger(logger).addFilter(without(text))


def without(text: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of log records: those with `text` in their message are left out."""
    return lambda record: text not in record.getMessage()


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)  # a fault all ranks share is told once: rank 0's exit makes torchrun end this one first
    where = f" (rank {rank})" if rank != "0" else ""
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(2)


def run_child(command: Sequence[str]) -> None:
    """Run the ranks of a job under this process: Hydra outside, torchrun inside, one output folder.

    A multirun cannot itself run under torchrun, where every rank would sweep. Signals are passed on; exits with the
    child's status unless that is 0.
    """
    process = subprocess.Popen(list(command), env=environment_of_child())
    previous = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    status = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def child_command(module: str, nproc: int, rendezvous: Sequence[str]) -> list[str]:
    """The present Hydra job as a command of its own, with the same output folder; torchrun where it has many ranks."""
    job = HydraConfig.get()
    overrides = [override for override in job.overrides.task if not override.startswith("nproc=")]
    return [*python_module(nproc, rendezvous), module, *overrides, f"hydra.run.dir='{job.runtime.output_dir}'"]


def python_module(nproc: int, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """``python -m``, through torchrun where there are many ranks."""
    command = [sys.executable, "-m"]
    if nproc > 1 or list(rendezvous) != ["--standalone"]:
        command += ["shared.launch.torchrun", *rendezvous, f"--nproc-per-node={nproc}", "-m"]
    return command


def expand_launcher(arguments: Sequence[str]) -> list[str]:
    """Hydra uses a launcher in multiruns only: naming one asks for a multirun, of one job if need be."""
    names_one = any(argument.startswith("hydra/launcher=") for argument in arguments)
    is_multirun = any(argument in ("-m", "--multirun") for argument in arguments)
    return ["--multirun", *arguments] if names_one and not is_multirun else list(arguments)


def is_failed_job(error: Exception) -> bool:
    """Whether `error` is submitit's report of a job that failed."""
    return any(kind.__module__.startswith("submitit.") for kind in type(error).__mro__)


def expand_shorthands(overrides: Sequence[str]) -> list[str]:
    """Rewrite ``model=/path/or/hub-id`` to ``model.path=...`` where no option of the group has that name.

    Also ``hooks.layers=8,16`` to a list.
    """
    expanded = []
    for override in overrides:
        group, equals, value = override.partition("=")
        is_option = (resources.files("conf") / group / f"{value}.yaml").is_file() if group in PATH_SHORTHANDS else True
        if equals and not is_option and "," not in value:
            override = f"{PATH_SHORTHANDS[group]}={value}"
        if group in LISTS and re.fullmatch(r"[\w-]+(,[\w-]+)+", value):
            override = f"{group}=[{value}]"
        expanded.append(override)
    return expanded


def rank_overrides() -> list[str]:
    """Under torchrun only rank 0 owns the run folder and the log file."""
    if os.environ.get("RANK", "0") == "0":
        return []
    return ["hydra.output_subdir=null", "hydra/job_logging=rank"]


def describe_config_error(error: Exception) -> str:
    """One line that names the key and the nearest valid one."""
    full_key = getattr(error, "full_key", None)
    text = str(error).strip().splitlines()[0]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        full_key = cause.full_key or full_key
        text = str(cause).strip().splitlines()[0]
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '([^']+)')", text)
    if unknown:
        key = full_key or unknown[1]
        return f"unknown configuration key {key!r}{suggestion(cause or error, unknown[1])}"
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if missing:
        key = full_key or missing[1]
        return f"{key} has no value: give {key}=... on the command line"
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text)
    if ambiguous:
        key, values = ambiguous.groups()
        return f"{key}={values} is a sweep: add -m, or write {key}=[{values}] for a list"
    option = re.search(r"Could not find '([^']+)'", text) or re.search(r"Could not load '([^']+)'", text)
    if option and option[1].startswith("hydra/launcher/submitit"):
        return "hydra/launcher=slurm needs submitit: pip install 'granary[slurm]'"
    if option:
        group, _, name = option[1].rpartition("/")
        return f"no option {name!r} in group {group!r}: choose from {', '.join(group_options(group))}"
    prefix = f"{full_key}: " if full_key and full_key not in text else ""
    return f"{prefix}{text}"


def suggestion(error: BaseException, key: str) -> str:
    """`` (did you mean ...?)`` from the valid keys of the node that refused `key`."""
    object_type = getattr(error, "object_type", None)
    names: list[str] = list(getattr(object_type, "__dataclass_fields__", {}))
    parent = getattr(error, "parent_node", None)
    if not names and isinstance(parent, DictConfig):
        names = [str(name) for name in parent]
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f": choose from {', '.join(sorted(names))}" if names else ""


def group_options(group: str) -> list[str]:
    """Names of the YAML files of a config group."""
    folder = Path(str(resources.files("conf"))) / group
    return sorted(path.stem for path in folder.glob("*.yaml"))
