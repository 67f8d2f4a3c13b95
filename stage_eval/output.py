"""Where results go, and how they get there: an evaluation replaces the former one in its place as a whole.

Everything is made in a hidden folder beside its place, plots included. Only when all of it is complete are the former
results moved out, eval.json first, and the new ones moved in, eval.json last. So whenever a process dies, an eval.json
is never beside a report, a plot or latents of another evaluation.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.basics.files import is_abandoned, lock_folder, write_bytes
from shared.basics.run_folder import RunFolder
from stage_eval.config import EvalSchema
from stage_eval.results.comparison import Comparison
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.record import Json
from stage_eval.sae_folders import SAEFolder
from stage_eval.show.compare import render_comparison
from stage_eval.show.plots import evaluation_plots
from stage_eval.show.report import render
from stage_eval.show.sweep_plots import comparison_plots
from stage_eval.show.theme import Plot, to_png

HERE = RunFolder(Path())
EVALUATION = tuple(str(path) for path in (HERE.evaluation, HERE.latent_figures, HERE.report, HERE.plots))
"""What an evaluation of one SAE writes; what is named first is the first to go and the last to come."""
COMPARISON = tuple(str(path) for path in (HERE.comparison, HERE.comparison_page, HERE.plots))
STAGING = ".evaluation-"
LEFTOVER_SECONDS = 3600  # where the file system has no locks


class Staged:
    """Results on their way to the folder `place`; `names` are the files and folders that they consist of.

    A context manager: on an exception what was staged is removed and the place is as it was.
    """

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self.place, self.names = place, names
        self.staging = place
        self._held: int | None = None

    def __enter__(self) -> Self:
        with told(self.place):
            self.place.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.place)
            while self._held is None:
                self.staging = self.place / f"{STAGING}{uuid.uuid4().hex[:8]}"
                self.staging.mkdir()
                with suppress(FileNotFoundError):  # another evaluation took it for a leftover before it was held
                    self._held = lock_folder(self.staging)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)

    def write(self, name: str, content: bytes) -> None:
        """Stage a file; `name` may be inside of a folder."""
        with told(self.place):
            write_bytes(self.staging / "new" / name, content)

    def write_json(self, name: str, document: Json) -> None:
        """Stage indented JSON."""
        self.write(name, (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def write_plots(self, plots: Sequence[Plot]) -> None:
        """Stage the plots as PNG."""
        for plot in plots:
            self.write(f"plots/{plot.name}.png", to_png(plot))

    def move_in(self) -> None:
        """Replace the former results by the staged ones."""
        with told(self.place):
            (self.staging / "old").mkdir()
            for name in self.names:
                if (self.place / name).exists():
                    (self.place / name).rename(self.staging / "old" / name)
            for name in reversed(self.names):
                if (self.staging / "new" / name).exists():
                    (self.staging / "new" / name).rename(self.place / name)


def remove_leftovers(place: Path) -> None:
    """Remove what evaluations that died had staged; one that is at work holds its folder, or has a young one."""
    for left in place.glob(f"{STAGING}*"):
        if is_abandoned(left) or time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def told(place: Path) -> Iterator[None]:
    """Say in one line why results can't be written (a full disk, no permission)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise GranaryError(
            f"the results can't be written to {place} ({reason}): give out_dir=FOLDER, or make room"
        ) from None


def stage_evaluation(staged: Staged, evaluation: Evaluation, latents: dict[str, Tensor], *, drawn: bool) -> None:
    """Make eval.json and latents.safetensors of one SAE; with `drawn`, report.html and plots/ too."""
    staged.write_json("eval.json", evaluation.to_json())
    staged.write("latents.safetensors", save(latents))
    if drawn:
        staged.write("report.html", render(evaluation).encode())
        staged.write_plots(evaluation_plots(evaluation))


def stage_comparison(staged: Staged, comparison: Comparison, *, drawn: bool) -> None:
    """Make comparison.json of several SAEs; with `drawn`, comparison.html and plots/ too."""
    staged.write_json("comparison.json", comparison.to_json())
    if drawn:
        staged.write("comparison.html", render_comparison(comparison).encode())
        staged.write_plots(comparison_plots(comparison))


def result_folders(cfg: EvalSchema, folders: Sequence[SAEFolder]) -> list[Path]:
    """Where the results of each SAE go: no two share a place, and none takes that of the run's own SAE.

    A lone SAE's go to ``out_dir`` where one is given, and to ``run_dir`` where it is the run's own, ``<run_dir>/sae``.
    All others' go beside the SAE; into the common folder for one from a hub or in a folder that can't be written to.
    """
    out = common_folder(cfg)
    if len(folders) == 1:
        is_own = Path(folders[0].path).resolve() == RunFolder(Path(cfg.run_dir)).sae.resolve()
        if cfg.out_dir is not None or is_own:
            return [out]
    return [beside(folder, out) for folder in folders]


def common_folder(cfg: EvalSchema) -> Path:
    """Where a comparison goes."""
    return Path(cfg.run_dir if cfg.out_dir is None else cfg.out_dir)


def beside(folder: SAEFolder, out: Path) -> Path:
    """The SAE's own folder, or one under `out` that is called after it."""
    here = Path(folder.path)
    if here.is_dir() and os.access(here, os.W_OK):
        return here
    return out / folder.path.strip("/").replace("/", "--")
