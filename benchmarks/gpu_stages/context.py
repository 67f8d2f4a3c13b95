"""What a stage is given, and how it hands over what it found: one JSON line at a time, on disk before the next."""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_providers import Shape

SHAPES = {
    "a": Shape(4096, 131072, 64, 8192),
    "b": Shape(4096, 262144, 128, 32768),
    "cached": Shape(768, 6144, 50, 8192),
}
PUBLISHED = 7_716
"""Tokens per second of OpenSAE on an H100, of shape b with the model's forward."""
TINY = Shape(24, 70, 4, 6)


@dataclass(frozen=True)
class Context:
    """One stage's surroundings."""

    stage: str
    out: Path
    rehearse: bool
    """Tiny shapes in the interpreter, on a CPU: every line of code, no figure."""
    fallback: bool = False
    """Plain forms instead of the fused ones, so that there are times whatever fails."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def kernels(self) -> str:
        return "triton"

    def shape(self, name: str) -> Shape:
        """By name; the tiny one in a rehearsal."""
        return TINY if self.rehearse else SHAPES[name]

    def say(self, name: str, **fields: Any) -> None:
        """Write one result."""
        write_line(self.out, {"stage": self.stage, "name": name, **fields})

    def check(self, name: str, error: float, limit: float, **fields: Any) -> None:
        """Write a comparison's outcome; NaN fails."""
        self.say(name, ok=bool(error <= limit), error=error, limit=limit, **fields)

    def milliseconds(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """Median of `repeats` calls after two that are not counted, by events on the device."""
        for _ in range(0 if self.rehearse else 2):
            call()
        return statistics.median(self._once(call) for _ in range(1 if self.rehearse else repeats))

    def steady(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """Milliseconds of one of `repeats` calls that follow each other without a wait, as steps of a training do."""

        def calls() -> None:
            for _ in range(repeats):
                call()

        if self.rehearse:
            return self._once(call)
        for _ in range(2):
            call()
        return statistics.median(self._once(calls) / repeats for _ in range(3))

    def _once(self, call: Callable[[], Any]) -> float:
        if self.rehearse:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def write_line(out: Path, line: dict[str, Any]) -> None:
    """Append to the results and wait until they are on disk."""
    text = json.dumps(line)
    print(text, flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
