"""Waiting: when it looks, when it reports, how it is given up."""

from collections.abc import Iterator

import pytest

from shared.basics import waiting
from shared.basics.waiting import wait_until


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_what_is_ready_is_not_waited_for(clock: Clock) -> None:
    reports: list[float] = []
    assert wait_until(lambda: True, lambda: reports.append(clock.now)) == 0
    assert not reports + clock.pauses


def test_reports_come_at_once_and_then_every_minute(clock: Clock) -> None:
    reports: list[float] = []
    waited = wait_until(lambda: clock.now >= 200, lambda: reports.append(clock.now))
    assert 200 <= waited < 205
    assert [round(at / 60) for at in reports] == [0, 1, 2, 3]
    assert clock.pauses[0] == 0.05
    assert clock.pauses == sorted(clock.pauses)
    assert clock.pauses[-1] == 5.0


def test_waiting_can_be_given_up(clock: Clock) -> None:
    def give_up() -> None:
        if clock.now > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_until(lambda: False, lambda: None, give_up=give_up)
    assert clock.now < 10
