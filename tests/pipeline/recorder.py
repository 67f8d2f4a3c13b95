"""``stage_train`` whose every step first appends its batch to ``batches.bin`` in the run's out_dir.

A record is int64 (step, epoch, index in the epoch, values), then the activations in float32: what a kill cannot undo.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from stage_train.data.stream import Batch
from stage_train.step import loop

FILE = "batches.bin"


class Recorder:
    """Observes all steps of this process."""

    def before_step(self, run: loop.Learner, batch: Batch) -> None:
        (folder,) = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("out_dir=")]
        (rows_ND,) = batch.activations.values()
        rows = rows_ND.numpy()
        header = np.array([run.step, batch.epoch, batch.index, rows.size], np.int64)
        with Path(folder, FILE).open("ab", buffering=0) as file:
            file.write(header.tobytes() + rows.tobytes())

    def after_step(self, run: loop.Learner, batch: Batch) -> None:
        pass


if __name__ == "__main__":
    loop.observers.append(Recorder())
    runpy.run_module("stage_train", run_name="__main__", alter_sys=True)
