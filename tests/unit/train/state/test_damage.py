"""A damaged checkpoint or metrics file: what is intact is used and kept, what is not is named."""

import json
import logging
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from stage_train.job import train as train_command
from stage_train.show.loggers import JsonlLogger
from stage_train.state.export import main
from tests.training import Runs, assert_same_run

pytestmark = pytest.mark.usefixtures("train_configs")

TWO = ("checkpoint.every=10", "checkpoint.keep=2")


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of a file, that far into it."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


VICTIMS, FAULTS = ("training.json", "tensors-00000.safetensors", "digests.json"), ("flipped", "short", "missing")
# By default each file once and each fault once; every pair under the slow marker.
DAMAGED = [
    pytest.param(victim, fault, marks=() if VICTIMS.index(victim) == FAULTS.index(fault) else pytest.mark.slow)
    for victim in VICTIMS
    for fault in FAULTS
]


@pytest.mark.parametrize(("victim", "fault"), DAMAGED)
def test_the_checkpoint_before_a_damaged_one_is_used(
    train: Runs, straight: Callable[[], Path], victim: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = train.killed("a", *TWO, step=25)
    newest, older = (out / f"checkpoints/step-000000{step}" for step in (20, 10))
    path = newest / victim
    if fault == "flipped":
        flip(path)
    elif fault == "short":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    with caplog.at_level(logging.INFO):
        train("a", *TWO)
    assert re.search(rf"checkpoint {newest} is damaged \((it has no )?{victim}", caplog.text)
    assert f"using {older}" in caplog.text
    assert "continuing from step 10 of 42" in caplog.text
    assert_same_run(straight(), out)
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000040", "step-00000042"]


def test_without_an_intact_checkpoint_nothing_is_lost(train: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    out = train.killed("a", *TWO, step=25)
    for step in (10, 20):
        flip(out / f"checkpoints/step-000000{step}/tensors-00000.safetensors")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(GranaryError, match=r"step-00000020 is damaged \(tensors-.*is damaged in .*\), and no older"):
        train("a", *TWO)
    with pytest.raises(SystemExit):
        main([str(out)])
    assert "step-00000020 is damaged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_metrics_behind_a_damaged_line_stay(train: Runs, straight: Callable[[], Path]) -> None:
    out = train.stopped("a", step=23)
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    lines[1] = b'{"step": 10, "lo\xff'
    (out / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 25, "fvu": 9}', b'{"step": 30, "f']))
    train("a")
    after = (out / "metrics.jsonl").read_bytes().splitlines()
    assert after[: len(lines)] == lines
    assert [line["step"] for line in read_metrics(out)] == [5, 15, 20, 25, 30, 35, 40, 42]
    assert read_metrics(out)[3]["fvu"] == read_metrics(straight())[4]["fvu"]


def test_only_lines_with_a_step_are_metrics(tmp_path: Path) -> None:
    text = ['{"step": 1, "a": 2}', "[1]", "7", '{"a": 1}', '{"step": "x"}', "", '{"step": 2, "a": 3}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(text))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    logger = JsonlLogger(tmp_path, 2)
    logger.write({"step": 3, "a": 4})
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*text[:-1], json.dumps({"step": 3, "a": 4})]


@pytest.mark.parametrize("most", [0, *(pytest.param(most, marks=pytest.mark.slow) for most in (100, 8192))])
def test_a_full_disk_is_one_line_at_every_write(train: Runs, straight: Callable[[], Path], most: int) -> None:
    """No file may grow beyond `most` bytes. What was saved stays, nothing half-written does, and the run goes on."""
    out = train.stopped("a", step=9)
    before = {path.name for path in out.rglob("*")}
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit))
    try:
        with pytest.raises(GranaryError, match=r"(can't|could not) be written \(.*File too large") as caught:
            train_command([train.cfg("a", "logger.curves=true")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert "\n" not in str(caught.value)
    assert {path.name for path in out.rglob("*") if ".partial" in path.name} == set()
    assert before <= {path.name for path in out.rglob("*")}
    train("a", "logger.curves=true")
    assert_same_run(straight(), out)
