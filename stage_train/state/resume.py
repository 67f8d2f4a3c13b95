"""Where a run begins: at a checkpoint of its own in its folder, or anew."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.parallel import World
from stage_train.config import Resume, TrainSchema, as_dict
from stage_train.state.checkpoint import Checkpoints, read_state
from stage_train.state.identity import changes, check_same_run, identity, is_extension
from stage_train.step.schedule import LearningRate, peak_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run goes on from."""

    checkpoints: Checkpoints
    checkpoint: Path | None = None
    """None: it begins anew."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint holds beside tensors."""
    discards: bool = False
    """Whether an earlier run in the folder gives way, once this one makes its first step."""

    def check_values(self, slope: float, rate: LearningRate, rows: int) -> None:
        """Raise GranaryError where a default stands for another number than what the run was begun with.

        AuxK's slope and the learning rate are as they are now, of a dictionary with so many `rows` of its decoder.
        """
        if self.checkpoint is None:
            return
        begun = self.state.get("sae", {}).get("training", {}).get("auxk_slope", 0.0)
        if begun != slope:
            raise self._differs(f"with AuxK's slope at {begun}, not {slope}", f"sae.auxk_slope={begun}")
        named = self.state["identity"]["optim.lr"]
        if (peak := peak_rate(named, rows, rate.total_steps)) != rate.peak:
            raise self._differs(f"whose learning rate peaks at {peak:g}, not {rate.peak:g}", f"optim.lr={named}")

    def _differs(self, how: str, mend: str) -> GranaryError:
        return GranaryError(
            f"{self.checkpoint} is of a run {how}: continue it with {mend}, or begin anew with checkpoint.resume=never"
        )

    @classmethod
    def find(cls, cfg: TrainSchema, world: World) -> Self:
        """Look for an earlier part of the same run; changes nothing on disk.

        A damaged checkpoint is passed over for the one before it, and both are named. Raises GranaryError when the
        folder holds another run, and for ``checkpoint.resume=must`` without one.
        """
        folder = Path(cfg.out_dir)
        checkpoints = Checkpoints(RunFolder(folder).checkpoints, keep=cfg.checkpoint.keep, world=world)
        if cfg.checkpoint.resume is Resume.never:
            return cls(checkpoints, discards=True)
        newest = checkpoints.latest_intact()
        if newest is None:
            if cfg.checkpoint.resume is Resume.must:
                raise GranaryError(f"checkpoint.resume=must, but there is no checkpoint in {checkpoints.folder}")
            return cls(checkpoints)
        state, wanted = read_state(newest), identity(as_dict(cfg))
        check_same_run(state["identity"], wanted, folder)
        if is_extension(state["identity"], wanted):
            return cls._extending(checkpoints, newest, state, "; ".join(changes(state["identity"], wanted)))
        return cls(checkpoints, newest, state)

    @classmethod
    def _extending(cls, checkpoints: Checkpoints, newest: Path, state: Mapping[str, Any], what: str) -> Self:
        """For a run that was shorter: from its last checkpoint before the learning rate's decay, or else its last."""
        decays_from, last = state.get("decays_from"), int(state["step"])
        if decays_from is None or last <= decays_from:
            log.info("extending the run: %s; from its last checkpoint, step %d", what, last)
            return cls(checkpoints, newest, state)
        try:
            before = checkpoints.latest_intact(up_to=decays_from)
        except GranaryError:
            before = None
        if before is None:
            log.info(
                "extending the run: %s; from its last checkpoint, step %d, although the learning rate has decayed "
                "since step %d: no checkpoint from before that is kept (checkpoint.keep, checkpoint.every)",
                what, last, decays_from,
            )  # fmt: skip
            return cls(checkpoints, newest, state)
        state = read_state(before)
        log.info(
            "extending the run: %s; from step %d, its last checkpoint before the learning rate's decay",
            what, int(state["step"]),
        )  # fmt: skip
        return cls(checkpoints, before, state)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state.get("step", 0))
