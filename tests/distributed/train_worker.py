"""One rank of a distributed training test: runs the jobs of a JSON file, one list of Hydra overrides each, in turn.

Started by ``python -m shared.parallel.launch --nproc-per-node N``. A job may end in an error that the user would see;
each rank writes how its jobs ended to ``<jobs>.<rank>``. ``stop_at`` makes the first rank receive SIGTERM in that step,
``poison`` gives the last rank a NaN.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from shared.errors import GranaryError
from shared.parallel import World, init_world, shutdown
from stage_train import config
from stage_train.run import Run
from stage_train.trainer import Trainer

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

    cfg: Any = OmegaConf.to_object(compose("train", overrides=job["overrides"]))
    Trainer.step = step  # type: ignore[method-assign]
    try:
        Run(cfg, world).execute()
    except GranaryError as error:
        return str(error)
    except SystemExit as stopped:
        return "stopped" if stopped.code == 0 else f"exit {stopped.code}"
    finally:
        Trainer.step = STEP  # type: ignore[method-assign]
    return "done"


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
