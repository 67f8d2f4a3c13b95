"""Schedules as pure functions of the step: the learning rate, k, the weight of the sparsity penalty."""

import math
from dataclasses import dataclass

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig

SHAPES = ("linear", "cosine", "sqrt")
K_SHAPES = ("linear", "exponential")
# a of the exponential k schedule (Language-Model-SAEs).
STEEPNESS = 3.0
# Steps from which on a longer run wants a lower rate.
LONG = 2000


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

    @property
    def decays_from(self) -> int:
        """Steps before the decay; all, without one."""
        return self.total_steps - min(self.decay_steps, self.total_steps - self.warmup_steps)

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0. The first step's is above 0 even with a warm-up."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = self.total_steps - self.decays_from
        into = step + 1 - self.decays_from
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsPerToken:
    """k of topk and batchtopk: ``start`` for ``cold_steps``, then down to ``end`` over ``warmup_steps``.

    Llama Scope began with every latent active (4096 to 50); the exponential form is Language-Model-SAEs'.
    """

    start: int
    end: int
    cold_steps: int
    warmup_steps: int
    shape: str
    """linear or exponential."""

    def __post_init__(self) -> None:
        if self.shape not in K_SHAPES:
            raise GranaryError(f"schedule.k_shape={self.shape!r}: choose from {', '.join(K_SHAPES)}")
        if self.start < self.end:
            raise GranaryError(f"schedule.k_start={self.start} is less than sae.k={self.end}: k only falls")

    def at(self, step: int) -> int:
        """k of a step, counted from 0; `end` from step ``cold_steps + warmup_steps`` on."""
        into = step - self.cold_steps
        if into < 0:
            return self.start
        if into >= self.warmup_steps:
            return self.end
        progress = into / self.warmup_steps
        if self.shape == "exponential":
            progress = (1 - math.exp(-STEEPNESS * progress)) / (1 - math.exp(-STEEPNESS))
        return max(self.end, math.ceil(self.start - (self.start - self.end) * progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyScale:
    """What multiplies the sparsity penalty: from 0 to 1, linearly."""

    warmup_steps: int

    def at(self, step: int) -> float:
        """The factor of a step, counted from 0; 1 from step ``warmup_steps - 1`` on."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


def automatic_rate(num_latents: int, steps: int) -> float:
    """``2e-4 / sqrt(F / 2^14)``: the rule of sparsify and OpenSAE, after the fits of Gao et al. 2024."""
    return 2e-4 / math.sqrt(num_latents / 2**14)


def rate_by_width(num_latents: int, steps: int) -> float:
    """``1e-2 sqrt(2048 / F)``: that rule through the best rates found at 512 and 2,048 latents (docs/log.md)."""
    return 1e-2 * math.sqrt(2048 / num_latents)


def rate_by_width_and_length(num_latents: int, steps: int) -> float:
    """``rate_by_width``, times ``sqrt(LONG / steps)`` in runs of more than `LONG` steps (docs/log.md)."""
    return rate_by_width(num_latents, steps) * math.sqrt(min(1, LONG / steps))


RATES = {"auto": automatic_rate, "by_width": rate_by_width, "by_width_and_length": rate_by_width_and_length}


def bias_factor_by_width(num_latents: int) -> float:
    """``6 sqrt(F / 2048)``: times ``rate_by_width`` that is 6e-2 for any F, as pre-activations keep their size."""
    return 6 * math.sqrt(num_latents / 2048)


def bias_factor(value: float | str, sae: DictionaryConfig) -> float:
    """The number, or what ``by_width`` stands for. Raises GranaryError for another name."""
    if isinstance(value, str):
        if value != "by_width":
            raise GranaryError(f"optim.bias_factor={value}: give a number, or by_width for 6 sqrt(F / 2048)")
        # A gate's bias has no gradient from the reconstruction, and was better slow (docs/log.md, 2026-11-25).
        return 1.0 if sae.activation == "gated" else bias_factor_by_width(sae.d_latent)
    return value


def peak_rate(lr: float | str, rows: int, steps: int) -> float:
    """The number, or what a name in RATES stands for, F being the decoder's `rows`; raises GranaryError for others."""
    if isinstance(lr, str):
        if lr not in RATES:
            raise GranaryError(
                f"optim.lr={lr}: give a number, by_width for 1e-2 sqrt(2048 / F), by_width_and_length for that times "
                f"sqrt({LONG} / steps) in longer runs, or auto for 2e-4 / sqrt(F / 2^14)"
            )
        return RATES[lr](rows, steps)
    return lr


def length_in_steps(value: int | float, total_steps: int, key: str) -> int:
    """A whole number is steps, a fraction (up to 1.0) is a share of the run. Raises GranaryError naming `key`."""
    if value < 0:
        raise GranaryError(f"{key}={value}: a length is not negative")
    if isinstance(value, int):
        return value
    if value > 1:
        raise GranaryError(f"{key}={value}: write a whole number of steps, or a share of the run up to 1.0")
    return round(value * total_steps)
