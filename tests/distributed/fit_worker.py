"""One rank of test_fit_ranks: fits SAEs on its own share of the rows, and leaves what it has in a file of its own.

Usage: torchrun ... fit_worker.py FOLDER [OVERRIDE ...].
"""

import sys
from pathlib import Path

import torch

import granary
from granary import SAEConfig
from shared.parallel import init_world, shutdown
from tests.modules import MLP, planted_rows, seeded


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    world = init_world("cpu", 1)
    batches = planted_rows()[world.rank :: world.size]
    with granary.attach(seeded(MLP)(), {"fc1": SAEConfig(k=3, expansion=4)}) as saes:
        metrics = granary.fit(saes, batches, tokens=6400, overrides=overrides)
        weights = saes["fc1"].state_dict()
    torch.save({"metrics": metrics["fc1"], "weights": weights}, folder / f"{world.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
