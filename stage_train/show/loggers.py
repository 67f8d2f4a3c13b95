"""Where metrics go: always ``metrics.jsonl``, by choice TensorBoard and Weights & Biases."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from shared.basics.errors import GranaryError
from shared.basics.files import replacing
from shared.basics.metrics_file import lines_up_to
from shared.basics.run_folder import RunFolder
from stage_train.config import LoggerKind, LoggerSchema

Metrics = Mapping[str, float | int]


class Logger(Protocol):
    """Takes one set of metrics per logging step."""

    def write(self, metrics: Metrics) -> None:
        """Record metrics; "step" is among them."""

    def close(self) -> None:
        """Flush and release."""


class JsonlLogger:
    """One JSON object per line and logging step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Lines of steps after `first_step`, left by a run that went on after its last checkpoint, are removed.

        A damaged line among those that stay is left as it is.
        """
        path = RunFolder(folder).metrics
        with replacing(path) as kept:
            for line in lines_up_to(folder, first_step) if first_step else ():
                kept.write(line + b"\n")
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Append one line, visible to readers at once."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush the lines to disk."""
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoardLogger:
    """Scalars under ``tensorboard/``."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise GranaryError(
                "logger.kinds=[tensorboard] needs tensorboard: pip install 'granary-sae[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(RunFolder(folder).tensorboard), purge_step=first_step or None)

    def write(self, metrics: Metrics) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run, continued under the same id when training resumes.

    What the configuration leaves open is wandb's own variables' to say: WANDB_MODE, WANDB_PROJECT, WANDB_NAME,
    WANDB_DIR and all that ``wandb.init`` reads. WANDB_RUN_ID and WANDB_RESUME are not asked: a run's folder has its id.
    """

    def __init__(self, cfg: LoggerSchema, folder: Path, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise GranaryError("logger.kinds=[wandb] needs wandb: pip install 'granary-sae[wandb]'") from error
        try:
            self._run = wandb.init(
                project=cfg.project or os.environ.get("WANDB_PROJECT") or "granary",
                name=os.environ.get("WANDB_NAME") or name,
                id=run_id,
                resume="allow",
                reinit="create_new",  # beside those of other runs in this process
                mode=None if cfg.mode is None else cfg.mode.value,
                dir=os.environ.get("WANDB_DIR") or folder,
                config=dict(config),
            )
        except (wandb.Error, ValueError) as error:
            said = " ".join(str(error).split())
            raise GranaryError(f"wandb begins no run ({said}): log in to it, or give logger.mode=offline") from error

    def write(self, metrics: Metrics) -> None:
        """One history row."""
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"]))

    def close(self) -> None:
        """Finish the upload, or the offline folder."""
        self._run.finish()


def check_loggers(cfg: LoggerSchema) -> None:
    """Raise GranaryError naming the extra to install for a logger whose package is missing."""
    for kind in cfg.kinds:
        if find_spec(kind.value) is None:
            raise GranaryError(
                f"logger.kinds=[{kind.value}] needs {kind.value}: pip install 'granary-sae[{kind.value}]'"
            )


def make_loggers(
    cfg: LoggerSchema, folder: Path, *, first_step: int, run_id: str, name: str, config: Mapping[str, Any]
) -> list[Logger]:
    """All loggers of a run. Raises GranaryError naming the extra to install when a package is missing."""
    loggers: list[Logger] = []
    if LoggerKind.tensorboard in cfg.kinds:
        loggers.append(TensorBoardLogger(folder, first_step))
    if LoggerKind.wandb in cfg.kinds:
        loggers.append(WandbLogger(cfg, folder, run_id, name, config))
    return [JsonlLogger(folder, first_step), *loggers]
