"""What the entry points share: Hydra outside, one clear line on a wrong input, ranks and jobs as child processes."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from shared.basics.display import masked, refuse_password
from shared.basics.files import write_text
from shared.launch import slurm
from shared.launch.allocator import ask_for_memory
from shared.launch.counts import expand_counts
from shared.launch.hydra_main import hydra_main
from shared.launch.orphans import environment_of_child
from shared.launch.outcome import ending_in_one_line, fail
from shared.launch.overrides import (
    expand_launcher,
    expand_shorthands,
    name_swept_keys,
    quote_text,
    rank_overrides,
)
from shared.launch.schema import fill, schema_of

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

    Exits as ``shared.launch.outcome`` says: with status 2 and one line on stderr for what a user can mend.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the line below is ours and not Hydra's multi-line one
    os.environ.update(slurm.CHOICE_OF_WARNING)
    ask_for_memory()
    drop_chatter()

    def run(cfg: DictConfig) -> None:
        if slurm.in_submitted_job():
            slurm.supervise(child_command(f"stage_{config_name}", cfg.nproc, slurm.rendezvous()))
            return
        if cfg.get("nproc", 1) > 1 and "RANK" not in os.environ and not cfg.get("packed", False):
            run_child(child_command(f"stage_{config_name}", cfg.nproc, ["--standalone"]))
            return
        mask_saved()
        with ending_in_one_line():  # here as well: on its way out Hydra would add a line of its own
            task(fill(cfg))

    submitted = any(argument.startswith("hydra/launcher=") for argument in sys.argv)
    on_interrupt = ["its jobs stay in the queue (squeue, scancel)"] if submitted else []
    with ending_in_one_line(*on_interrupt):
        refuse_password(*sys.argv[1:])
        schema = schema_of(config_name)
        arguments = expand_launcher(spelt_out(sys.argv[1:], schema))
        sys.argv[1:] = name_swept_keys(arguments, schema) + rank_overrides()
        try:
            hydra_main(run, config_name)
        except Exception as error:
            if not is_failed_job(error):
                raise
            fail(f"a Slurm job failed: {str(error).strip().splitlines()[-1]}")
        afterwards()


def spelt_out(arguments: Sequence[str], schema: type) -> list[str]:
    """A command line as Hydra sees and records it: shorthands written out, counts as whole numbers, text quoted.

    Raises GranaryError naming the key for a count that is no whole number.
    """
    return expand_counts(expand_shorthands(quote_text(arguments)), schema)


def mask_saved() -> None:
    """Mask secrets in what Hydra has saved of the command line: URLs may be signed. The run itself has them."""
    job = HydraConfig.get()
    saved = [Path(job.runtime.output_dir, job.output_subdir)] if job.output_subdir is not None else []
    files = [file for folder in saved for file in folder.glob("*.yaml")]
    for file in [*files, Path(job.sweep.dir, "multirun.yaml")]:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if masked(text) != text:
            write_text(file, masked(text))


def drop_chatter() -> None:
    """Leave out what libraries log that is not about the user's run; a warning of any other text still shows."""
    for logger, text in CHATTER:
        logging.getLogger(logger).addFilter(without(text))


def without(text: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of log records: those with `text` in their message are left out."""
    return lambda record: text not in record.getMessage()


def run_child(command: Sequence[str]) -> None:
    """Run the ranks of a job under this process: Hydra outside, torchrun inside, one output folder.

    A multirun cannot itself run under torchrun, where every rank would sweep. Signals are passed on, once each: the
    child is in a process group of its own, so that a terminal's Ctrl-C does not reach it twice. A second Ctrl-C kills
    the group. Exits with the child's status unless that is 0.
    """
    process = subprocess.Popen(list(command), env=environment_of_child(), process_group=0)
    interrupted = False

    def pass_on(received: int, _: object) -> None:
        nonlocal interrupted
        if received == signal.SIGINT and interrupted:
            os.killpg(process.pid, signal.SIGKILL)
            return
        interrupted = interrupted or received == signal.SIGINT
        process.send_signal(received)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
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


def is_failed_job(error: Exception) -> bool:
    """Whether `error` is submitit's report of a job that failed."""
    return any(kind.__module__.startswith("submitit.") for kind in type(error).__mro__)
