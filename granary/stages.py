"""The stages from Python: the same code and keys as ``granary harvest|train|eval|inspect``, and what they made.

    store = granary.harvest(name="mine", corpus="text", **{"corpus.files": "data/*.txt"})
    sae = granary.train(name="mine", sae={"k": 32, "expansion": 16})
    (scores,) = granary.evaluate(name="mine")
    latents = granary.inspect(name="mine")

Keys are given as on a command line (``"variant=transcoder"``), as keywords, or as the object that `configure` makes of
either, whose fields may be changed. With ``nproc`` above 1 the ranks are processes of their own, as on a command line.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.basics.errors import GranaryError
from shared.launch.compose import as_overrides, composed
from shared.launch.outcome import INTERRUPTED
from shared.launch.overrides import path_overrides
from shared.launch.stage import python_module

if TYPE_CHECKING:
    from shared.latents import Latents
    from shared.sae import Dictionary
    from shared.store import Store
    from stage_eval.config import EvalSchema
    from stage_eval.results.evaluation import Evaluation
    from stage_harvest.config import HarvestSchema
    from stage_inspect.config import InspectSchema
    from stage_train.config import TrainSchema


@dataclass(frozen=True)
class _Stage:
    """A stage: where its code is, and whether ``sae=`` and ``model=`` of its command line may hold a path as it is."""

    package: str
    function: str
    """What does its work, ``module:name`` in the package."""
    takes_paths: bool = False
    fixed: tuple[str, ...] = ()

    def overrides(self, given: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """What a command line would say."""
        told = [*given, *as_overrides(settings)]
        return [*self.fixed, *(path_overrides(told) if self.takes_paths else told)]

    def configure(self, overrides: Sequence[str]) -> Any:
        """Fill the stage's schema."""
        importlib.import_module(f"{self.package}.config").register()
        return composed(self.package.removeprefix("stage_"), overrides)

    def work(self, cfg: Any) -> None:
        """Do it in this process: one configuration, or several where the stage takes them."""
        module, _, name = self.function.partition(":")
        with _as_a_function():
            getattr(importlib.import_module(f"{self.package}.{module}"), name)(cfg)


_STAGES = {
    "harvest": _Stage("stage_harvest", "entry:harvest"),
    # A command line leaves the folder to Hydra, which is not there.
    "train": _Stage("stage_train", "job:train", fixed=("out_dir=${run_dir}/${sae_name}",)),
    "evaluate": _Stage("stage_eval", "evaluate:evaluate", takes_paths=True),
    "inspect": _Stage("stage_inspect", "inspect:inspect", takes_paths=True),
}
_ERROR = "error: "


def configure(stage: str, *overrides: str, **settings: Any) -> Any:
    """The configuration of a stage ("harvest", "train", "evaluate", "inspect"), as its command line makes it.

    Raises GranaryError, in the words of the command line, for what it would refuse.
    """
    if stage not in _STAGES:
        raise GranaryError(f"there is no stage {stage!r}: choose from {', '.join(_STAGES)}")
    return _STAGES[stage].configure(_STAGES[stage].overrides(overrides, settings))


def harvest(*given: "str | HarvestSchema", **settings: Any) -> "Store":
    """Run a language model over a corpus and write its activations, or what is missing of them; return the store.

    Raises GranaryError for every wrong input, before anything is written.
    """

    cfg = _run("harvest", given, settings)
    from shared.store import Store

    return Store.open(cfg.store.url)


def train(*given: "str | TrainSchema", **settings: Any) -> "Dictionary":
    """Train a dictionary from a store, or go on where an earlier call with the same keys stopped; return it.

    Raises GranaryError for every wrong input, and for a run that has diverged.
    """

    cfg = _run("train", given, settings)
    from shared.sae import load

    return load(cfg.out_dir)


def train_together(cfgs: "Sequence[TrainSchema]") -> "list[Dictionary]":
    """Train a dictionary for each configuration, all from one pass over the store, as a packed sweep does.

    Each needs an ``out_dir`` of its own. Raises GranaryError where they do not ask for the same order of tokens.
    """
    if not cfgs:
        raise GranaryError("train_together needs at least one configuration: granary.configure('train', ...)")
    if any(cfg.nproc > 1 for cfg in cfgs):
        raise GranaryError("train_together is one process: start granary train packed=true for several")
    folders = [cfg.out_dir for cfg in cfgs]
    if len(set(folders)) < len(folders):
        raise GranaryError("two configurations have one out_dir: give each its own, with sae_name= or out_dir=")
    from shared.sae import load

    _STAGES["train"].work(cfgs)
    return [load(folder) for folder in folders]


def evaluate(*given: "str | EvalSchema", **settings: Any) -> "list[Evaluation]":
    """Score one SAE or several, write figures, plots and report as the stage does; return the figures of each.

    Raises GranaryError for every wrong input, before any long work.
    """

    cfg = _run("evaluate", given, settings)
    from shared.basics.config import named_urls
    from shared.basics.documents import read_json
    from shared.basics.run_folder import RunFolder
    from shared.store.beside import open_beside
    from stage_eval.output import result_folders
    from stage_eval.results.evaluation import Evaluation
    from stage_eval.sae_folders import find_saes

    scored = find_saes(cfg.sae, open_beside(cfg.store.url, named_urls(cfg.store.beside)), cfg.hook).folders
    return [Evaluation.from_json(read_json(RunFolder(place).evaluation)) for place in result_folders(cfg, scored)]


def inspect(*given: "str | InspectSchema", **settings: Any) -> "Latents":
    """Find what each latent of a dictionary does, or what is missing of that; return the latents folder.

    Raises GranaryError for every wrong input, before any long work.
    """

    cfg = _run("inspect", given, settings)
    from shared.latents import Latents

    return Latents.open(cfg.latents.url)


def _run(name: str, given: Sequence[Any], settings: dict[str, Any]) -> Any:
    """Do the work of a stage and return its configuration."""
    stage = _STAGES[name]
    is_object = len(given) == 1 and not isinstance(given[0], str)
    if is_object and settings:
        raise GranaryError(f"{', '.join(settings)}: change the configuration itself, or give keys alone")
    overrides = [] if is_object else stage.overrides(given, settings)
    cfg = given[0] if is_object else stage.configure(overrides)
    for key in ("dry_run", "packed"):
        if getattr(cfg, key, False):
            raise GranaryError(f"{key}=true makes nothing that could be returned: it is for the command line")
    if cfg.nproc > 1 and "RANK" not in os.environ:
        if is_object:
            raise GranaryError(f"nproc={cfg.nproc} starts processes from keys: give keys, not a configuration object")
        _run_ranks([*python_module(cfg.nproc), stage.package, *overrides])
    else:
        stage.work([cfg] if name == "train" else cfg)  # which may be given several
    return cfg


@contextmanager
def _as_a_function() -> Iterator[None]:
    """Turn the end of a process, which a stop signal is answered with, into an exception."""
    try:
        yield
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise GranaryError("stopped by a signal; what was done is saved, and the same call goes on from it") from None


def _run_ranks(command: Sequence[str]) -> None:
    """Run the ranks of a stage, passing on what they print; raises GranaryError with the line they end with."""
    with subprocess.Popen(list(command), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        last = b""
        while part := os.read(process.stderr.fileno(), 1 << 16):
            sys.stderr.write(part.decode(errors="replace"))
            last = (last + part)[-(1 << 14) :]
    if process.returncode:
        told = [line for line in last.decode(errors="replace").splitlines() if line.startswith(_ERROR)]
        status = f"{Path(command[-1]).name}: its processes ended with status {process.returncode}"
        raise GranaryError(told[-1].removeprefix(_ERROR) if told else status)
