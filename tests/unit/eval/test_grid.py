"""The runs of the last sweep of a folder, from the records that Hydra leaves of real sweeps of training."""

from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.sae.finding import expand
from stage_eval.grid import is_of_grid, last_grid
from stage_eval.sae_folders import of_last_grid
from tests.cli import ForkServer

# Training's configuration and names of folders without its work.
APP = """
import shared.sae
from shared.launch.hydra_main import hydra_main
from stage_train.config import register
register()
hydra_main(lambda cfg: None, "train")
"""


def sweep(stages: ForkServer, folder: Path, *overrides: str) -> None:
    (folder / "app.py").write_text(APP)
    done = stages.run(str(folder / "app.py"), "-m", f"run_dir={folder}", "nproc=1", "name=mine", *overrides)
    assert done.code == 0, done.stderr


def test_only_the_runs_of_the_last_sweep_are_its_grid(stages: ForkServer, tmp_path: Path) -> None:
    with pytest.raises(GranaryError, match=r"has no multirun.yaml.*leave out sae.last_grid"):
        last_grid(tmp_path / "sweep")
    sweep(stages, tmp_path, "sae.k=2,4", "sae.expansion=8", "seed=1")
    sweep(stages, tmp_path, "sae.k=4,8", "sae.expansion=8,16", "at_layer=1", "reads='layers.${at_layer}.mlp_in'")
    folder = tmp_path / "sweep"
    grid = last_grid(folder)
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(runs) == 6
    kept = [run for run in runs if is_of_grid(run, grid)]
    assert [run.name for run in kept] == sorted(run.name for run in runs if "seed" not in run.name)
    for run in runs:
        (run / "train.yaml").touch()
    assert set(of_last_grid(str(folder), expand(str(folder)))) == set(map(str, kept))
