"""How long a step takes."""

import time
from statistics import median_high

from stage_train.data.stream.batch import AnyBatch
from stage_train.step.trainer import Trainer


def seconds_per_step(trainer: Trainer, batch: AnyBatch, steps: int) -> float:
    """Median time of `steps` steps on the same batch, after one that is not counted; they change the weights."""
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        trainer.step(batch)
        float(trainer.grad_norm)  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return median_high(seconds[1:])
