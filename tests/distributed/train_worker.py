"""One rank of a distributed training test: runs the jobs of a JSON file, one list of Hydra overrides each, in turn.

Started by ``python -m shared.parallel.launch --nproc-per-node N``. A job may end in an error that the user would see;
each rank writes how its jobs ended to ``<jobs>.<rank>``. ``stop_at`` makes the first rank receive SIGTERM in that step,
``poison`` gives the last rank a NaN, ``count`` adds to the end how many messages had the size of the gradients.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from shared.errors import GranaryError
from shared.parallel import World, init_world, shutdown
from stage_train import config
from stage_train.job import Job
from stage_train.trainer import Trainer

ALL_REDUCE = dist.all_reduce
STEP = Trainer.step
"""As it is without faults."""


def run(job: dict[str, Any], world: World) -> str:
    """How the job ended: "done", "stopped", or the error's line. Needs Hydra to be initialised."""

    def step(self: Trainer, batch: Any) -> None:
        if self.progress.step + 1 == job.get("stop_at") and world.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.progress.step + 1 == job.get("poison") and world.rank == world.size - 1:
            batch.activations[self.hook].fill_(float("nan"))
        STEP(self, batch)

    messages = 0

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal messages
        messages += tensor.numel() >= job.get("count", 0)
        return ALL_REDUCE(tensor, *args, **kwargs)

    cfg: Any = OmegaConf.to_object(compose("train", overrides=job["overrides"]))
    Trainer.step = step  # type: ignore[method-assign]
    dist.all_reduce = all_reduce
    try:
        Job([cfg], world).execute()
    except GranaryError as error:
        return str(error)
    except SystemExit as stopped:
        return "stopped" if stopped.code == 0 else f"exit {stopped.code}"
    finally:
        Trainer.step = STEP  # type: ignore[method-assign]
        dist.all_reduce = ALL_REDUCE
    return f"done, {messages} messages" if "count" in job else "done"


def main() -> None:
    jobs = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = init_world("cpu")
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        ends = [run(job, world) for job in json.loads(jobs.read_text())]
    jobs.with_suffix(f".{world.rank}").write_text(json.dumps(ends))
    shutdown()


if __name__ == "__main__":
    main()
