"""One rank of a distributed training test: runs the jobs of a JSON file, one list of Hydra overrides each, in turn.

Started by ``python -m shared.launch.torchrun --nproc-per-node N``. A job may end in an error that the user would see;
each rank writes how its jobs ended to ``<jobs>.<rank>``. ``stop_at`` makes the first rank receive SIGTERM in that step,
``poison`` gives the last rank a NaN, ``count`` adds to the end how many messages had that many numbers or more, and
``digest`` a hash of what every rank should hold alike. A job ``{"ties": k}`` trains nothing; see ``tied_picks``.
"""

import hashlib
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
from torch.distributed.tensor import DTensor

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum, init_world, shutdown
from shared.sae.config import SAEConfig
from shared.sae.learn.objective import Objective
from shared.sae.variants import SAE
from stage_train import config
from stage_train.job import Job
from stage_train.step.layouts.latent import LatentParallel, shard
from stage_train.step.trainer import Trainer

ALL_REDUCE = dist.all_reduce
# What FSDP calls; newer versions of torch have another name for it.
REDUCE_SCATTER_NAME = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
REDUCE_SCATTER = getattr(dist, REDUCE_SCATTER_NAME)
STEP = Trainer.step
"""As it is without faults."""


def run(job: dict[str, Any], world: World) -> str:
    """How the job ended: "done", "stopped", or the error's line. Needs Hydra to be initialised."""
    if "ties" in job:
        return tied_picks(job["ties"], world)
    trainers = []

    def step(self: Trainer, batch: Any) -> None:
        trainers[:] = [self]
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

    def reduce_scatter(*args: Any, **kwargs: Any) -> Any:
        nonlocal messages
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        messages += max(tensor.numel() for tensor in tensors) >= job.get("count", 0)
        return REDUCE_SCATTER(*args, **kwargs)

    cfg: Any = OmegaConf.to_object(compose("train", overrides=job["overrides"]))
    Trainer.step = step  # type: ignore[method-assign]
    dist.all_reduce = all_reduce
    setattr(dist, REDUCE_SCATTER_NAME, reduce_scatter)
    try:
        Job([cfg], world).execute()
    except GranaryError as error:
        return str(error)
    except SystemExit as stopped:
        return "stopped" if stopped.code == 0 else f"exit {stopped.code}"
    finally:
        Trainer.step = STEP  # type: ignore[method-assign]
        dist.all_reduce = ALL_REDUCE
        setattr(dist, REDUCE_SCATTER_NAME, REDUCE_SCATTER)
    if "digest" in job:
        return f"done, {digest(trainers[0])}"
    return f"done, {messages} messages" if "count" in job else "done"


def digest(trainer: Trainer) -> str:
    """Of the tensors that are not cut."""
    cut = isinstance(trainer.layout, LatentParallel)
    whole = {
        name: tensor.numpy().tobytes()
        for name, tensor in trainer.objective.dictionary.state_dict().items()
        if not isinstance(tensor, DTensor) and not (cut and not trainer.layout.is_whole(name))
    }
    return hashlib.sha256(b"".join(whole.values())).hexdigest()[:8] + f" of {', '.join(whole)}"


def tied_picks(k: int, world: World) -> str:
    """Select the k of a dictionary whose latents all tie, cut among the ranks: how many, and whether as one process."""
    whole = SAE(SAEConfig(d_model=4, d_latent=8, k=k), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole.W_enc.copy_(whole.W_enc[0].expand(8, 4))
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    part = shard(Objective(whole), world.rank, dist.group.WORLD)
    found, wanted = torch.zeros(2, 16, 9).unbind()  # the last column is for padding
    _, indices = part.dictionary.activation.select(part.dictionary, x, k)
    found.scatter_(1, torch.where(indices < 0, 8, indices + part.shard.first), 1.0)
    all_reduce_sum(found)
    wanted.scatter_(1, whole.activation.select(whole, x, k)[1] % 9, 1.0)  # -1 is 8
    return f"{int(found[:, :8].sum(1).max())} picks, as one process: {torch.equal(found[:, :8], wanted[:, :8])}"


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
