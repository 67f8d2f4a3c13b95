"""The learning-rate schedule against the values its documentation promises."""

import itertools
import math
from typing import Any

import pytest

from shared.basics.errors import GranaryError
from shared.sae import SAEConfig
from stage_train.step.schedule import (
    LONG,
    LatentsPerToken,
    LearningRate,
    PenaltyScale,
    automatic_rate,
    bias_factor,
    length_in_steps,
    peak_rate,
)


def rates(total: int, warmup: int, decay: int, shape: str = "linear", final: float = 0.0) -> list[float]:
    rate = LearningRate(peak=2.0, total_steps=total, warmup_steps=warmup, decay_steps=decay, shape=shape, final=final)
    return [rate.at(step) for step in range(total)]


def test_zero_lengths_are_constant() -> None:
    assert rates(5, 0, 0) == [2.0] * 5


def test_warmup_stable_decay() -> None:
    assert rates(10, 4, 3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


def test_decay_is_cut_to_what_the_warmup_leaves() -> None:
    assert rates(6, 2, 100) == rates(6, 2, 4) == pytest.approx([1.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates(3, 3, 3) == pytest.approx([2 / 3, 4 / 3, 2.0])


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_decay_falls_to_the_floor(shape: str) -> None:
    values = rates(1000, 0, 1000, shape, final=0.1)
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[0] == pytest.approx(2.0, rel=0.05)
    assert values[-1] == pytest.approx(0.2, rel=0.01)
    assert values[499] == pytest.approx(
        2 * (0.1 + 0.9 * {"linear": 0.5, "cosine": 0.5, "sqrt": 0.293}[shape]), rel=0.01
    )


def test_lengths_are_steps_or_shares() -> None:
    assert length_in_steps(7, 1000, "schedule.warmup") == 7
    assert length_in_steps(1, 1000, "schedule.warmup") == 1
    assert length_in_steps(1.0, 1000, "schedule.warmup") == 1000
    assert length_in_steps(0.05, 1000, "schedule.warmup") == 50
    assert length_in_steps(0.0, 1000, "schedule.warmup") == 0
    with pytest.raises(GranaryError, match=r"schedule\.decay=1\.5"):
        length_in_steps(1.5, 1000, "schedule.decay")
    with pytest.raises(GranaryError, match="not negative"):
        length_in_steps(-1, 1000, "schedule.decay")


def test_nonsense_is_one_line() -> None:
    with pytest.raises(GranaryError, match="warmup is 7 steps, but the run has 5"):
        rates(5, 7, 0)
    with pytest.raises(GranaryError, match="shape"):
        rates(5, 0, 0, shape="exponential")
    with pytest.raises(GranaryError, match="final"):
        rates(5, 0, 0, final=2.0)


def latents(start: int, end: int, cold: int, warmup: int, shape: str = "linear") -> list[int]:
    schedule = LatentsPerToken(start=start, end=end, cold_steps=cold, warmup_steps=warmup, shape=shape)
    return [schedule.at(step) for step in range(cold + warmup + 2)]


def test_k_stays_falls_and_ends() -> None:
    assert latents(50, 10, cold=2, warmup=4) == [50, 50, 50, 40, 30, 20, 10, 10]
    assert latents(50, 10, cold=0, warmup=0) == [10, 10]
    assert latents(50, 10, cold=3, warmup=0) == [50, 50, 50, 10, 10]
    assert latents(10, 10, cold=1, warmup=2) == [10] * 5


def test_k_falls_exponentially_and_never_below_its_end() -> None:
    values = latents(4096, 50, cold=0, warmup=100, shape="exponential")
    assert values[0] == 4096
    assert values[50] == math.ceil(4096 - 4046 * (1 - math.exp(-1.5)) / (1 - math.exp(-3)))
    assert values[100:] == [50, 50]
    assert all(a >= b >= 50 for a, b in itertools.pairwise(values))
    assert values[10] < latents(4096, 50, cold=0, warmup=100)[10]  # faster at first


def test_k_that_would_rise_is_refused() -> None:
    with pytest.raises(GranaryError, match=r"schedule.k_start=9 is less than sae.k=10"):
        latents(9, 10, 0, 1)
    with pytest.raises(GranaryError, match=r"schedule.k_shape='sqrt'"):
        latents(20, 10, 0, 1, shape="sqrt")


def test_penalty_rises_to_one() -> None:
    assert [PenaltyScale(warmup_steps=4).at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert PenaltyScale(warmup_steps=0).at(0) == 1.0


def test_rates_by_name() -> None:
    assert peak_rate(3e-3, 77, 10**6) == 3e-3
    assert peak_rate("auto", 2**16, 10**6) == 1e-4
    assert [peak_rate("by_width", latents, 10**6) for latents in (512, 2048, 8192)] == [2e-2, 1e-2, 5e-3]
    with pytest.raises(GranaryError, match=r"optim\.lr=fast: give a number, by_width for"):
        peak_rate("fast", 2048, 1)


def test_a_long_run_has_a_lower_rate() -> None:
    rates = [peak_rate("by_width_and_length", 2048, steps) for steps in (1, LONG - 1, LONG, 4 * LONG, 100 * LONG)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 1e-3])
    assert rates[:3] == [peak_rate("by_width", 2048, 1)] * 3


def test_factor_of_the_biases() -> None:
    def sae(num_latents: int, **options: Any) -> SAEConfig:
        return SAEConfig(d_model=4, d_latent=num_latents, **{"k": 2, **options})

    assert bias_factor(5, sae(77)) == 5
    for latents in (512, 2048, 8192):
        assert bias_factor("by_width", sae(latents)) * peak_rate("by_width", latents, 1) == pytest.approx(6e-2)
    gated = sae(2048, activation="gated", k=None)
    assert bias_factor("by_width", gated) == 1
    with pytest.raises(GranaryError, match=r"optim\.bias_factor=fast: give a number, or by_width for"):
        bias_factor("fast", sae(77))


def test_automatic_rate() -> None:
    assert automatic_rate(2**14, 1) == 2e-4
    assert automatic_rate(262_144, 1) == pytest.approx(5e-5)
