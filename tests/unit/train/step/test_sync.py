"""A step between two logging steps reads nothing back from the device."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from shared.store import Store
from stage_train.job import Job
from stage_train.run import make_trainer
from stage_train.step.trainer import DEAD_EVERY
from tests.training import WORLD, Runs

pytestmark = pytest.mark.usefixtures("train_configs")

# What makes the host wait for a CUDA device: reading a number, and results whose size depends on the data.
WAITS = {"_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "equal", "is_nonzero"}


class CountWaits(TorchDispatchMode):
    """Counts calls of WAITS."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in WAITS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", [[], ["sae.multi_topk_weight=0.125"], ["sae=jumprelu", "sae.k=null"]])
def test_steps_between_logging_do_not_wait(
    tmp_path: Path, planted_store: Callable[..., Store], choice: list[str]
) -> None:
    planted_store(tmp_path / "store")
    job = Job([Runs(tmp_path).cfg("sae", *choice)], WORLD)
    (spec,), inputs = job.specs, job.open_inputs()
    trainer = make_trainer(spec, inputs, inputs.open_stream(0, 1, spec.length.end), job.layout, begins=True)
    # The plain kernels read nothing back; those for the CPU do, where that is cheap.
    trainer.objective.dictionary.kernels = trainer.optimiser.kernels = "reference"
    with closing(trainer.stream) as stream:
        for number, batch in enumerate(stream):
            with CountWaits() as counter:
                trainer.step(batch)
            if number % DEAD_EVERY:
                # The optimiser's step number, which lies in host memory under any device.
                assert counter.waits == {"_local_scalar_dense": 1}, number
            else:
                assert counter.waits["nonzero"] == 1  # the look at dead latents
            if number == 20:
                break
    with CountWaits() as counter:
        trainer.read_metrics()
    assert counter.waits["_local_scalar_dense"] > 1
