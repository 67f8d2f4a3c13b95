"""Reconstruction sums: a worked example, any split of the data, numerical safety, and the latents' figures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stage_eval.measure.reconstruction import frequency_histogram, latent_figures, reconstruction_figures
from stage_eval.measure.sums import ReconstructionSums, Rows

D, F, K = 6, 10, 3


def rows(contexts: list[int]) -> Rows:
    zero = torch.zeros(len(contexts), dtype=torch.int64)
    return Rows(torch.tensor(contexts), zero, zero)


def empty(d_model: int = D, d_latent: int = F, contexts: int = 4, shift: Tensor | None = None) -> ReconstructionSums:
    return ReconstructionSums(
        contexts=contexts,
        d_latent=d_latent,
        positions=1,
        frequencies=1,
        shift_D=torch.zeros(d_model) if shift is None else shift,
    )


def test_a_hand_computed_example() -> None:
    sums = empty(d_model=2, d_latent=3, contexts=2)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    x_hat = torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, 1.0]])
    values = torch.tensor([[1.0, 0.0], [2.0, 0.5], [4.0, 0.0]])
    indices = torch.tensor([[0, -1], [0, 1], [0, 1]])  # a kept latent of value 0 has not fired
    sums.add(x, x_hat, values, indices, rows([0, 0, 1]))
    metrics = reconstruction_figures(sums)
    # Mean (2, 1); scatter (1+1) + (0+1) + (0+4) = 8; error 1 + 0 + 4 = 5; energy 1 + 9 + 13 = 23.
    assert metrics.fvu == pytest.approx(5 / 8, rel=1e-12)
    assert metrics.fvu_uncentred == pytest.approx(5 / 23, rel=1e-12)
    # Dimension 0: scatter 2, error 0; dimension 1: scatter 6, error 5.
    assert metrics.fvu_per_dimension_mean == pytest.approx((0 + 5 / 6) / 2, rel=1e-12)
    assert metrics.mse == pytest.approx(5 / 6, rel=1e-12)
    assert metrics.cosine == pytest.approx((1 / 2**0.5 + 1 + 7 / (13 * 5) ** 0.5) / 3, rel=1e-12)
    assert metrics.relative_norm == pytest.approx((2**0.5 + 1 + (5 / 13) ** 0.5) / 3, rel=1e-12)
    assert metrics.reconstruction_bias == pytest.approx((2 + 9 + 5) / (1 + 9 + 7), rel=1e-12)
    assert metrics.l0 == pytest.approx((1 + 2 + 1) / 3, rel=1e-12)
    assert metrics.l1 == pytest.approx((1 + 2.5 + 4) / 3, rel=1e-12)
    latents = latent_figures(sums, 3)
    assert (latents.dead, latents.dense) == (1, 2)
    assert latents.densest[0].to_json() == {"latent": 0, "frequency": 1.0, "mean_activation": pytest.approx(7 / 3)}


def random_batch(seed: int, count: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D, generator=generator) + 3
    x_hat = x + 0.1 * torch.randn(count, D, generator=generator)
    values = torch.rand(count, K, generator=generator)
    indices = torch.rand(count, F - 2, generator=generator).topk(K).indices
    return x, x_hat, values, indices, rows([i % 4 for i in range(count)])


def test_the_reference_vector_does_not_matter() -> None:
    batch = random_batch(0)
    one, other = empty(), empty(shift=torch.full((D,), 2.5))
    one.add(*batch)
    other.add(*batch)
    first, second = reconstruction_figures(one), reconstruction_figures(other)
    for name in ("fvu", "fvu_per_dimension_mean", "fvu_uncentred"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-12)


def test_intervals_hardly_depend_on_a_reference_near_the_mean() -> None:
    batch = random_batch(5, 2000)
    mean = batch[0].mean(0)
    intervals = []
    for shift in (mean, mean + 0.02):
        sums = empty(shift=shift)
        sums.add(*batch)
        intervals.append(reconstruction_figures(sums).confidence95["fvu"])
    assert intervals[0] == pytest.approx(intervals[1], rel=1e-2)


def test_parts_merge_to_the_whole() -> None:
    whole, left, right = empty(), empty(), empty()
    x, x_hat, values, indices, where = random_batch(1)
    whole.add(x, x_hat, values, indices, where)
    whole.add_bos(x[:3] * 9, x_hat[:3])
    for part, sums in ((slice(0, 20), left), (slice(20, 50), right)):
        chunk = Rows(where.context_N[part], where.position_N[part], where.frequency_N[part])
        sums.add(x[part], x_hat[part], values[part], indices[part], chunk)
    right.add_bos(x[:3] * 9, x_hat[:3])
    left.merge(right)
    for name, tensor in whole.added.items():
        torch.testing.assert_close(left.added[name], tensor, rtol=1e-12, atol=1e-12)
    assert torch.equal(left.maxed["activation_max_F"], whole.maxed["activation_max_F"])


def test_a_huge_mean_costs_no_digits() -> None:
    # float64 sums about 0 would lose 12 of 16 digits here; about a vector near the mean they lose none.
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1000, D, generator=generator, dtype=torch.float64)
    x = noise + 1e6
    sums = empty(shift=torch.full((D,), 1e6, dtype=torch.float64))
    nothing = torch.zeros(1000, 1), torch.full((1000, 1), -1)
    sums.add(x, x - 0.1, *nothing, rows([0] * 1000))
    scatter = float((noise - noise.mean(0)).square().sum())
    assert reconstruction_figures(sums).fvu == pytest.approx(0.01 * 1000 * D / scatter, rel=1e-8)


def test_a_constant_dimension_is_left_out_and_counted() -> None:
    x, _, values, indices, where = random_batch(3)
    x[:, 2] = 7.0
    sums = empty(shift=torch.full((D,), 7.0))
    sums.add(x, x - 1, values, indices, where)
    metrics = reconstruction_figures(sums)
    scatter = (x - x.mean(0)).double().square().sum(0)
    kept = [0, 1, 3, 4, 5]
    assert metrics.constant_dimensions == 1
    assert metrics.fvu_per_dimension_mean == pytest.approx(float((50 / scatter[kept]).mean()), rel=1e-6)


def test_zero_vectors_have_no_cosine() -> None:
    sums = empty()
    sums.add(torch.zeros(2, D), torch.zeros(2, D), torch.zeros(2, 1), torch.full((2, 1), -1), rows([0, 1]))
    assert reconstruction_figures(sums).cosine == 0


def test_with_bos_is_the_fvu_of_all_tokens_together() -> None:
    x, x_hat, values, indices, where = random_batch(4)
    bos, bos_hat = x[:5] * 10, x_hat[:5]
    sums = empty()
    sums.add(x, x_hat, values, indices, where)
    sums.add_bos(bos, bos_hat)
    everything = torch.cat([x, bos]).double()
    error = (everything - torch.cat([x_hat, bos_hat]).double()).square().sum()
    expected = error / (everything - everything.mean(0)).square().sum()
    with_bos = reconstruction_figures(sums).with_bos
    assert with_bos.fvu == pytest.approx(float(expected), rel=1e-9)
    assert (with_bos.n_bos, with_bos.n_tokens) == (5, 55)


def test_the_histogram_counts_every_living_latent() -> None:
    frequency = torch.tensor([0.0, 1e-3, 2e-3, 0.5, 1.0], dtype=torch.float64)
    histogram = frequency_histogram(frequency, torch.ones(5, dtype=torch.float64), num_tokens=1000)
    assert sum(histogram.latents) == 4
    assert sum(histogram.energy_share) == pytest.approx(1)
    assert histogram.log10_edges[0] == -3
    assert histogram.log10_edges[-1] == 0
    assert np.allclose(np.diff(histogram.log10_edges), 0.25)
