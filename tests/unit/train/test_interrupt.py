"""Ctrl-C saves as SIGTERM does; once more ends at once."""

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from shared.parallel import stop
from stage_train.state.checkpoint import newest_checkpoint
from tests.training import Runs, assert_same_run, exit_code, signalled_in, watching

pytestmark = pytest.mark.usefixtures("train_configs")


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_says_so(train: Runs, caplog: pytest.LogCaptureFixture) -> None:
    straight = train("straight")
    with caplog.at_level(logging.INFO), watching(before=signalled_in(13, signal.SIGINT)):
        assert exit_code(lambda: train("a")) == 130
    assert "stopped by Ctrl-C after step 13 of 42; all is saved in" in caplog.text
    assert_same_run(straight, train("a"))


def test_a_second_ctrl_c_does_not_wait(train: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(run: Any) -> None:
        if run.step == 12:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with watching(before=twice):  # a terminal and a starter send the same one
        assert exit_code(lambda: train("a")) == 130
    monkeypatch.setattr(stop, "ONE_PRESS", -1.0)
    with watching(before=twice), pytest.raises(KeyboardInterrupt):
        train("b")
    assert newest_checkpoint(train.folder / "b/checkpoints") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
