"""The progress of a harvest in words: durations, the forecast after the first shards, the share of waiting."""

import logging
import time
from datetime import datetime

import pytest
import torch

from shared.parallel import World
from stage_harvest.progress import HarvestProgress, Notices, clock_after

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def progress(todo: int = 12, **changes: int) -> HarvestProgress:
    fields = {"contexts": 16, "todo": todo, "shard_contexts": 4, "seq_len": 10, "context_bytes": 1000, "writers": 1}
    return HarvestProgress(ALONE, Notices(ALONE), **{**fields, **changes})


def test_the_end_is_told_by_the_clock() -> None:
    assert clock_after(0) == datetime.now().strftime("%H:%M")
    assert len(clock_after(3 * 86400)) == len("2026-11-20 12:00")


def test_a_forecast_comes_once_after_the_first_shards(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = progress()
    for _ in range(3):
        bar.advance(1, 0.0)
    assert not caplog.messages
    for _ in range(3):
        bar.advance(1, 0.0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("expected  ")
    assert "more at this speed" in caplog.messages[0]
    bar.close()


def test_what_is_shown_counts_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = progress(writers=2)
    bar.start = time.perf_counter() - 10
    bar.advance(4, 2.0)
    bar.advance(4, 5.0)
    assert bar._bar.n == (4 + 8) * 10
    assert bar._bar.postfix == "shard 3 of 4, 0 MB/s, disk wait 25%"
    bar.wait_for_all(12)
    bar.close()
    bar.report()
    assert "harvested 120 tokens in 10.0 s: 12 tokens/s, 0 MB/s, 25 % of the time waiting" in caplog.messages[-1]
