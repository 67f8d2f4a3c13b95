"""Where a run begins: at a checkpoint of its own in its folder, or anew."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.parallel import World
from stage_train.config import Resume, TrainSchema, as_dict
from stage_train.state.checkpoint import Checkpoints, read_state
from stage_train.state.identity import check_same_run, identity


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

    @classmethod
    def find(cls, cfg: TrainSchema, world: World) -> Self:
        """Look for an earlier part of the same run; changes nothing on disk.

        A damaged checkpoint is passed over for the one before it, and both are named. Raises GranaryError when the
        folder holds another run, and for ``checkpoint.resume=must`` without one.
        """
        folder = Path(cfg.out_dir)
        checkpoints = Checkpoints(folder / "checkpoints", keep=cfg.checkpoint.keep, world=world)
        if cfg.checkpoint.resume is Resume.never:
            return cls(checkpoints, discards=True)
        newest = checkpoints.latest_intact()
        if newest is None:
            if cfg.checkpoint.resume is Resume.must:
                raise GranaryError(f"checkpoint.resume=must, but there is no checkpoint in {checkpoints.folder}")
            return cls(checkpoints)
        state = read_state(newest)
        check_same_run(state["identity"], identity(as_dict(cfg)), folder)
        return cls(checkpoints, newest, state)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state.get("step", 0))
