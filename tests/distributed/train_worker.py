"""One rank of a distributed training test: does the jobs of a JSON file in turn.

Started by `ForkServer.ranks`, with torchrun's environment. A job names one of JOBS, with the Hydra overrides of
its run and further arguments of the function. It may end in an error that the user would see; each rank writes how its
jobs ended to ``<jobs>.<rank>``.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from hydra import initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum, init_world, shutdown
from shared.sae import groups
from shared.sae.config import SAEConfig
from shared.sae.learn.objective import Objective
from shared.sae.variants import SAE
from stage_train import config
from stage_train.config import LayoutKind, TrainSchema
from stage_train.data.stream import Batch, TrainingData
from stage_train.job import Job
from stage_train.run import make_objective, make_trainer
from stage_train.step import loop
from stage_train.step.layouts import Layout, part
from stage_train.step.layouts.latent import LatentParallel
from stage_train.step.trainer import Trainer
from tests.composing import composed

# What FSDP calls; newer versions of torch have another name for it.
REDUCE_SCATTER_NAME = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def run(job: dict[str, Any], world: World) -> str:
    """How a job ended: "done" (with what its function tells), "stopped", or the error's line. Hydra is initialised."""
    work = JOBS[job.get("job", "train")]
    arguments = {key: value for key, value in job.items() if key not in ("job", "name", "overrides")}
    if "overrides" in job:
        arguments["cfg"] = OmegaConf.to_object(composed("train", job["overrides"]))
    try:
        return work(world, **arguments)
    except GranaryError as error:
        return str(error)
    except SystemExit as stopped:
        return "stopped" if stopped.code in (0, 128 + signal.SIGTERM) else f"exit {stopped.code}"


@contextmanager
def observing(observer: loop.StepObserver) -> Iterator[None]:
    """Within it, the observer sees every step."""
    loop.observers.append(observer)
    try:
        yield
    finally:
        loop.observers.remove(observer)


class Observer:
    """Keeps the trainer, and does what its job asks for before a step."""

    trainer: Trainer

    def before_step(self, run: loop.Learner, batch: Batch) -> None:
        self.trainer = run.trainer

    def after_step(self, run: loop.Learner, batch: Batch) -> None:
        pass


def train(world: World, cfg: TrainSchema) -> str:
    """A run without a fault."""
    Job([cfg], world).execute()
    return "done"


def signalled(world: World, cfg: TrainSchema, step: int) -> str:
    """The first rank receives SIGTERM in that step."""

    class Signal(Observer):
        def before_step(self, run: loop.Learner, batch: Batch) -> None:
            if run.step + 1 == step and world.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    with observing(Signal()):
        return train(world, cfg)


def poisoned(world: World, cfg: TrainSchema, step: int) -> str:
    """The last rank sees NaN in that step."""

    class Poison(Observer):
        def before_step(self, run: loop.Learner, batch: Batch) -> None:
            if run.step + 1 == step and world.rank == world.size - 1:
                for rows_ND in batch.activations.values():
                    rows_ND.fill_(float("nan"))

    with observing(Poison()):
        return train(world, cfg)


def counted(world: World, cfg: TrainSchema, least: int) -> str:
    """Tells how many messages between ranks had `least` numbers or more, from the first step on."""
    messages = 0

    class Begin(Observer):
        def before_step(self, run: loop.Learner, batch: Batch) -> None:
            nonlocal messages
            messages *= run.step > 0  # the start sends pieces of rows

    def counting(name: str) -> Callable[..., Any]:
        send = getattr(dist, name)

        def counted_send(*args: Any, **kwargs: Any) -> Any:
            nonlocal messages
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            messages += max(tensor.numel() for tensor in tensors) >= least
            return send(*args, **kwargs)

        return counted_send

    with ExitStack() as stack:
        for name in ("all_reduce", REDUCE_SCATTER_NAME):
            stack.enter_context(patch.object(dist, name, counting(name)))
        stack.enter_context(observing(Begin()))
        train(world, cfg)
    return f"done, {messages} messages"


class Wire(TorchDispatchMode):
    """What is given to be sent: of every message its name and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = args[1] if "gather" in str(func) or "scatter" in str(func) else args[0]
            tensors = given if isinstance(given, list) else [given]
            self.messages.append((str(func), sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def measured(world: World, cfg: TrainSchema) -> str:
    """Tells, as JSON, each message of the steps, and the sites that were read from the store."""
    sites, wire, read = set(), Wire(), TrainingData.read

    def reading(self: TrainingData, row: int, site: str, out: Tensor) -> None:
        sites.add(site)
        read(self, row, site, out)

    class Measure(Observer):
        def before_step(self, run: loop.Learner, batch: Batch) -> None:
            wire.__enter__()

        def after_step(self, run: loop.Learner, batch: Batch) -> None:
            wire.__exit__(None, None, None)

    with observing(Measure()), patch.object(TrainingData, "read", reading):
        train(world, cfg)
    return json.dumps({"sites": sorted(sites), "messages": wire.messages})


def digested(world: World, cfg: TrainSchema) -> str:
    """Tells a hash of what every rank should hold alike."""
    observer = Observer()
    with observing(observer):
        train(world, cfg)
    return f"done, {digest(observer.trainer)}"


def digest(trainer: Trainer) -> str:
    """Of the tensors that are not cut."""
    cut = isinstance(trainer.layout, LatentParallel)
    whole = {
        name: tensor.numpy().tobytes()
        for name, tensor in trainer.objective.dictionary.state_dict().items()
        if not isinstance(tensor, DTensor) and not (cut and not trainer.layout.is_whole(name))
    }
    return hashlib.sha256(b"".join(whole.values())).hexdigest()[:8] + f" of {', '.join(whole)}"


def tied_picks(world: World, k: int) -> str:
    """Select the k of a dictionary whose latents all tie, cut among the ranks: how many, and whether as one process."""
    whole = SAE(SAEConfig(d_model=4, d_latent=8, k=k), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole.W_enc.copy_(whole.W_enc[0].expand(8, 4))
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    found, wanted = torch.zeros(2, 16, 9).unbind()  # the last column is for padding
    wanted.scatter_(1, whole.activation.select(whole.encoder(), x, k)[1] % 9, 1.0)  # -1 is 8
    part = LatentParallel(world, world.size).distribute(Objective(whole))
    _, indices = part.dictionary.activation.select(part.dictionary.encoder(), x, k)
    found.scatter_(1, torch.where(indices < 0, 8, indices + part.shard.first), 1.0)
    all_reduce_sum(found)
    return f"{int(found[:, :8].sum(1).max())} picks, as one process: {torch.equal(found[:, :8], wanted[:, :8])}"


class Tallest(TorchDispatchMode):
    """The most rows of a tensor of that width that was made and has memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        held = made.to_local() if isinstance(made, DTensor) else made
        if isinstance(held, Tensor) and held.device.type != "meta" and held.shape[1:] == (self.width,):
            self.rows = max(self.rows, len(held))
        return made


def started(world: World, cfg: TrainSchema) -> str:
    """Make a run's trainer: have the ranks their parts of the whole, bit for bit, and made no more of a matrix?"""
    job = Job([cfg], world)
    inputs = job.open_inputs()
    (spec,) = job.specs
    width = spec.dictionary.widths.d_in
    with ExitStack() as stack:
        tallest = stack.enter_context(Tallest(width))
        stack.enter_context(patch.object(groups, "BLOCK_ROWS", 256))
        stack.enter_context(patch.object(part, "BLOCK_ELEMENTS", 1))
        stack.enter_context(patch.object(part, "LEAST_COLUMNS", width // 3))
        trainer = make_trainer(spec, inputs, None, job.layout, begins=True)  # type: ignore[arg-type]
    whole = make_objective(spec, inputs, torch.device("cpu"), Layout(world), begins=True).dictionary
    same, most = True, spec.dictionary.d_latent // (1 if cfg.parallel.layout is LayoutKind.ddp else world.size)
    for name, tensor in trainer.objective.dictionary.state_dict().items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        expected = whole.state_dict()[name]
        if own.shape != expected.shape:
            expected = expected[world.rank * len(own) : (world.rank + 1) * len(own)]
        same = same and torch.equal(own, expected)
    return f"the same: {same}, no more: {tallest.rows <= most or tallest.rows}"


JOBS: dict[str, Callable[..., str]] = {
    "train": train,
    "signalled": signalled,
    "poisoned": poisoned,
    "counted": counted,
    "digested": digested,
    "measured": measured,
    "tied_picks": tied_picks,
    "started": started,
}


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
