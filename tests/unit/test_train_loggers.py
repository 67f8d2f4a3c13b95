"""Metrics reach the loggers that were chosen: real event files, read back."""

from pathlib import Path

from stage_train.loggers import TensorBoardLogger


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
