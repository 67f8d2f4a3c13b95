"""Metrics reach the loggers that were chosen: real event files, read back."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.basics.errors import GranaryError
from stage_train.config import LoggerSchema, WandbMode
from stage_train.show.loggers import TensorBoardLogger, WandbLogger
from stage_train.show.progress import ProgressBar


def test_tensorboard_holds_every_metric(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, 0)
    logger.write({"step": 20, "fvu": 0.25, "l0": 32.0})
    logger.write({"step": 40, "fvu": 0.125, "l0": 31.5})
    logger.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("fvu")] == [(20, 0.25), (40, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("l0")] == [(20, 32.0), (40, 31.5)]
    assert "step" not in events.Tags()["scalars"]


def test_wandb_offline_holds_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: the run's file on disk is read back."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = LoggerSchema(every=1, kinds=[], progress=False, curves=False, project="granary", mode=WandbMode.offline)
    logger = WandbLogger(cfg, tmp_path, "abc123", "mine", {"sae": {"k": 32}})
    logger.write({"step": 20, "fvu": 0.25})
    logger.write({"step": 40, "fvu": 0.125})
    logger.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")

    # Its service process writes what is left after finish() has returned.
    deadline = time.monotonic() + 30
    while "exit" not in (kinds := [record.WhichOneof("record_type") for record in wandb_records(file)]):
        assert time.monotonic() < deadline, kinds
        time.sleep(0.05)
    rows = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append((items["_step"], items["fvu"]))
    assert rows == [(20, 0.25), (40, 0.125)]


@pytest.mark.parametrize(
    ("mode", "project", "expected"),
    [
        (None, None, ("of-environment", "their-name", "offline")),
        (WandbMode.disabled, "mine", ("mine", "their-name", "disabled")),
    ],
)
def test_what_is_left_open_the_environment_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: WandbMode | None,
    project: str | None,
    expected: tuple[str, str, str],
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "SILENT": "true",
        "MODE": "offline",
        "PROJECT": "of-environment",
        "NAME": "their-name",
        "DIR": str(tmp_path / "elsewhere"),
        "RUN_ID": "of-another",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it reads them once in a process
    (tmp_path / "elsewhere").mkdir()
    cfg = LoggerSchema(every=1, kinds=[], progress=False, curves=False, project=project, mode=mode)
    logger = WandbLogger(cfg, tmp_path, "abc123", "mine", {})
    run = logger._run
    assert (run.project, run.name, run.settings.mode) == expected
    logger.close()
    assert run.id == "abc123"
    assert len(list(tmp_path.glob("elsewhere/wandb/offline-run-*"))) == (mode is None)
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(GranaryError, match=r"wandb begins no run.*'online', 'offline'.*logger.mode=offline") as caught:
        WandbLogger(replace(cfg, mode=None), tmp_path, "abc124", "mine", {})
    assert "\n" not in str(caught.value)
    wandb.teardown()


def test_the_bar_shows_a_runs_figures(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(4_000, 1_000, enabled=True)
    bar.advance(500)
    one = {"loss": 0.25, "fvu": 0.2, "l0": 32.04, "dead_fraction": 0.125, "wait_share": 0.03}
    bar.show([one])
    bar.advance(500)
    bar.close()
    last = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert "2.00k/4.00k" in last
    assert "tok/s, loss 0.2500 FVU 0.2000 L0 32.0 dead 12.5% wait 3%" in last
    bar = ProgressBar(4_000, 1_000, enabled=True)
    bar.show([one, {**one, "fvu": 0.1, "l0": 64.0}])
    bar.close()
    assert "loss 0.2500 FVU 0.1000-0.2000 L0 32.0-64.0 dead 12.5% wait 3%" in capsys.readouterr().err
    ProgressBar(4_000, 0, enabled=False).close()
    assert capsys.readouterr().err == ""


def wandb_records(file: Path) -> list[Any]:
    """LevelDB's log format after a header of 7 bytes; no record of a short run is cut by the end of a 32 KiB block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, records = file.read_bytes(), 7, []
    assert len(data) < 1 << 15
    while place < len(data):
        begin = place + 7
        place = begin + int.from_bytes(data[place + 4 : place + 6], "little")
        if place <= len(data):  # else it is being written
            record = Record()
            record.ParseFromString(data[begin:place])
            records.append(record)
    return records
