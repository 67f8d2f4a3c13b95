"""The learning rate as a pure function of the step: warm-up, hold, decay."""

import math
from dataclasses import dataclass

from shared.errors import GranaryError

SHAPES = ("linear", "cosine", "sqrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """Linear warm-up over the first steps, then the peak, then a decay that ends with the run.

    Constant, linear, cosine and warm-up-stable-decay schedules are this with other lengths. Either length may be zero.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    decay_steps: int
    """Steps at the end that decay; cut to what the warm-up leaves."""
    shape: str
    """Of the decay: linear, cosine, or sqrt (1 - sqrt(progress), Haegele et al. 2024)."""
    final: float
    """Where the decay ends, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise GranaryError(f"schedule.shape={self.shape!r}: choose from {', '.join(SHAPES)}")
        if not 0 <= self.final <= 1:
            raise GranaryError(f"schedule.final={self.final}: it is a share of the peak, between 0 and 1")
        if self.warmup_steps > self.total_steps:
            raise GranaryError(
                f"schedule.warmup is {self.warmup_steps} steps, but the run has {self.total_steps}: shorten it"
            )

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0. The first step's is above 0 even with a warm-up."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = min(self.decay_steps, self.total_steps - self.warmup_steps)
        into = step + 1 - (self.total_steps - length)
        if into <= 0:
            return self.peak
        progress = min(
            into / (length + 1), 1.0
        )  # the last step is above the floor, the one before the decay at the peak
        left = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "sqrt": 1 - math.sqrt(progress),
        }[self.shape]
        return self.peak * (self.final + (1 - self.final) * left)


def length_in_steps(value: int | float, total_steps: int, key: str) -> int:
    """A whole number is steps, a fraction (up to 1.0) is a share of the run. Raises GranaryError naming `key`."""
    if value < 0:
        raise GranaryError(f"{key}={value}: a length is not negative")
    if isinstance(value, int):
        return value
    if value > 1:
        raise GranaryError(f"{key}={value}: write a whole number of steps, or a share of the run up to 1.0")
    return round(value * total_steps)
