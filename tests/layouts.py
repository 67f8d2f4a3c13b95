"""Training as a command, on one process or several: what two make of the same twenty steps is what one makes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import weights

LAYOUTS = {name: ("nproc=2", f"parallel={name}") for name in ("ddp", "fsdp", "latent")}


class Trainings:
    """Commands of ``python -m stage_train`` in a folder, with the same words before each one's own."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder, self.words = folder, words

    def __call__(self, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Train into the folder `name`, or be refused."""
        own = [f"out_dir={name}", f"hydra.run.dir={name}", *words]
        command = [sys.executable, "-m", "stage_train", *self.words, *own]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900)

    def assert_as_one(self, name: str, layouts: Sequence[str], *words: str) -> None:
        """Two processes in each of the layouts end with the weights of one process, but for the order of sums."""
        for layout in ("one", *layouts):
            done = self(f"{name}_{layout}", *words, *LAYOUTS.get(layout, ()))
            assert done.returncode == 0, done.stderr
        one = weights(self.folder / f"{name}_one")
        for layout in layouts:
            for key, tensor in weights(self.folder / f"{name}_{layout}").items():
                assert_close_in_norm(tensor, one[key], 2 * SAME_RUN, REORDERED)
