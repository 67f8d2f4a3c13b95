"""Statistics gathered while writing equal a second look at what was written."""

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.statistics import HookStatistics, Moments, NormFigures, RowStatistics
from tests.synthetic import synthetic_context, synthetic_plan, synthetic_shard, synthetic_store, synthetic_tokens

HOOK = "layers.2.resid_post"


def trainable_rows(store, contexts):
    """Float64 rows [N, D] of all masked-in positions, read back."""
    rows = [store.read_context(HOOK, int(c)).double()[torch.from_numpy(store.mask([c])[0])] for c in contexts]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_they_equal_brute_force_over_the_trainable_positions_of_training_shards(tmp_path, dtype):
    # 300 positions: more than one block of 128 rows
    store = synthetic_store(tmp_path, synthetic_plan(seq_len=300, chunk_tokens=100, dtype=dtype))
    x_ND = trainable_rows(store, store.contexts("train"))
    figures = store.statistics(HOOK)
    norms = np.linalg.norm(x_ND, axis=1)
    # int8 is measured in float32, before the reader rounds to bfloat16: a bias no larger than that rounding
    loose = 1e-3 if dtype == "int8" else 1e-5
    assert figures.count == len(x_ND)
    np.testing.assert_allclose(figures.mean, x_ND.mean(axis=0), rtol=loose, atol=loose)
    np.testing.assert_allclose(figures.var, x_ND.var(axis=0), rtol=5 * loose)
    assert figures.mean_norm == pytest.approx(norms.mean(), rel=loose)
    assert figures.rms_norm == pytest.approx(np.sqrt((norms**2).mean()), rel=loose)
    assert figures.max_norm == pytest.approx(norms.max(), rel=4e-3)
    assert figures.median_norm == pytest.approx(np.median(norms), rel=0.023)


def test_norms_by_position_equal_brute_force(tmp_path):
    store = synthetic_store(tmp_path, synthetic_plan(seq_len=300, chunk_tokens=100, dtype="float32"))
    contexts = store.contexts("train").tolist()
    norms = torch.stack([store.read_context(HOOK, c) for c in contexts]).double().norm(dim=2).numpy()
    mask = store.mask(contexts)
    groups = store.statistics(HOOK).norms_by_position
    assert [group.first for group in groups] == [0, *(2**g for g in range(9))][-len(groups) :]
    for group in groups:
        span = slice(group.first, group.last + 1)
        chosen = norms[:, span][mask[:, span]]
        assert group.count == len(chosen)
        for percent, value in group.percentiles.items():
            # the value that has this share of the rows below it, a histogram's bin of 4.4 % away at most
            assert np.quantile(chosen, percent / 100, method="inverted_cdf") == pytest.approx(value, rel=0.045)
    assert sum(group.count for group in groups) == store.statistics(HOOK).count


def test_outlier_dimensions_are_those_planted():
    x_ND = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    x_ND[:, 7] *= 50
    x_ND[:, 3] += 1000  # a constant counts: it is as large
    norms = NormFigures()
    norms.add((x_ND.astype(np.float64) ** 2).sum(1))
    moments = Moments(64, x_ND.mean(0), 64 * x_ND.var(0))
    found = HookStatistics.from_rows(RowStatistics(moments, norms)).outlier_dimensions()
    assert [dimension for dimension, _ in found] == [3, 7]
    assert found[0][1] == pytest.approx(1000, rel=0.2)
    assert found[1][1] == pytest.approx(50, rel=0.3)


@pytest.mark.parametrize(("dtype", "codec"), [("bfloat16", "none"), ("int8", "lz4"), ("float32", "none")])
def test_the_storage_error_is_what_it_says(tmp_path, dtype, codec):
    store = synthetic_store(tmp_path, synthetic_plan(dtype=dtype, codec=codec))
    contexts = store.contexts("train").tolist()
    mask = torch.from_numpy(store.mask(contexts))
    offered = torch.stack([synthetic_context(store.plan, HOOK, c) for c in contexts]).double()[mask]
    stored = torch.stack([store.read_context(HOOK, c) for c in contexts]).double()[mask]
    error = ((offered - stored) ** 2).sum() / ((stored - stored.mean(0)) ** 2).sum()
    found = store.statistics(HOOK).relative_squared_error
    assert found == pytest.approx(error.item(), rel=0.05)
    assert (found == 0) == (dtype == "float32")


def test_any_subset_and_any_writing_order_gives_the_same(tmp_path):
    plan = synthetic_plan(heldout_fraction=0.0)
    one = synthetic_store(tmp_path / "one", plan)
    two = Store.create(tmp_path / "two", plan, *synthetic_tokens(plan))
    for shard in (2, 0, 1):
        two.write_shard(shard, synthetic_shard(two, shard))
    a, b = one.statistics(HOOK), two.statistics(HOOK)
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.var, b.var)
    assert a.summary() == b.summary()
    assert one.statistics(HOOK, [2, 0]).count == int(one.mask([0, 1, 2, 3, 8, 9]).sum())


def test_variance_survives_a_large_mean():
    x_ND = np.random.default_rng(0).standard_normal((1000, 4)) + np.array([0.0, 1e3, 1e4, -1e4])
    x_ND = x_ND.astype(np.float32)
    rows = RowStatistics.empty(4)
    for start in range(0, 1000, 128):
        assert (
            rows.add_block(x_ND[None, start : start + 128].copy(), np.ones(len(x_ND[start : start + 128]), bool))
            is not None
        )
    np.testing.assert_allclose(rows.moments.m2 / 1000, x_ND.astype(np.float64).var(axis=0), rtol=2e-3)


def test_merging_is_exact_for_counts_and_close_for_moments():
    generator = np.random.default_rng(1)
    x_ND = generator.standard_normal((50, 3))
    moments = Moments.empty(3)
    for part in np.split(x_ND, [7, 7, 31]):
        mean = part.mean(axis=0) if len(part) else np.zeros(3)
        moments.merge(len(part), mean, ((part - mean) ** 2).sum(axis=0))
    np.testing.assert_allclose(moments.mean, x_ND.mean(axis=0))
    np.testing.assert_allclose(moments.m2, 50 * x_ND.var(axis=0))


def test_quantiles_of_norms_are_within_a_bin():
    norms = np.random.default_rng(2).lognormal(2.0, 1.0, 20_000)
    figures = NormFigures()
    figures.add(norms**2)
    for q in (0.05, 0.5, 0.95):
        assert figures.quantile(q) == pytest.approx(np.quantile(norms, q), rel=0.023)
    again = NormFigures.from_json(figures.to_json())
    assert again == figures
    assert np.isnan(NormFigures().quantile(0.5))


@pytest.mark.parametrize("parts", [2, 4])
def test_dimensions_that_come_dealt_add_up_to_the_same(parts):
    generator = np.random.default_rng(parts)
    x_ND = (generator.standard_normal((40, 24)) + 3).astype(np.float32)
    chosen_N = generator.random(40) < 0.7
    whole, dealt = RowStatistics.empty(24), RowStatistics.empty(24)
    memory = np.empty((40, 24 // parts), np.float32)  # every part is made in it

    def in_turn(x_ND):
        for part in range(parts):
            memory[:] = x_ND[:, part::parts]
            yield memory

    squared = whole.add_block([x_ND.copy()], chosen_N)
    np.testing.assert_allclose(dealt.add_block(in_turn(x_ND), chosen_N), squared, rtol=1e-6)
    for found, wanted in zip(
        (dealt.moments.mean, dealt.moments.m2),
        (x_ND[chosen_N].mean(0), x_ND[chosen_N].var(0) * chosen_N.sum()),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(dealt.moments.m2, whole.moments.m2)

    before = dealt.moments.mean.copy()
    for dimension in range(parts):
        bad_ND = x_ND.copy()
        bad_ND[np.flatnonzero(chosen_N)[-1], dimension] = np.nan
        assert dealt.add_block(in_turn(bad_ND), chosen_N) is None
        np.testing.assert_array_equal(dealt.moments.mean, before)
    assert dealt.moments.count == chosen_N.sum()


def test_norms_whose_square_overflows_float32_are_still_counted():
    squared = RowStatistics.empty(2).add_block(np.array([[[3e25, 4e25]]], np.float32), np.ones(1, bool))
    np.testing.assert_allclose(np.sqrt(squared), 5e25, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_where_it_would_be_trained_on(tmp_path, dtype, bad):
    plan = synthetic_plan(dtype=dtype)
    tokens, mask, segments = synthetic_tokens(plan)
    mask[5, 40], mask[5, 41] = True, False
    store = Store.create(tmp_path, plan, tokens, mask, segments)
    activations = synthetic_shard(store, 1)
    activations[HOOK][1, 41, 3] = bad  # masked out: allowed
    store.write_shard(1, {hook: tensor.clone() for hook, tensor in activations.items()})
    store = Store.create(tmp_path / "second", plan, tokens, mask, segments)
    activations[HOOK][1, 40, 3] = bad
    with pytest.raises(GranaryError, match=r"layers\.2\.resid_post: context 5, position 40 is NaN or infinite"):
        store.write_shard(1, activations)
    assert store.pending() == [0, 1, 2]
    np.testing.assert_array_equal(store.mask([5]), mask[[5]])


def test_a_value_beyond_float16_is_refused(tmp_path):
    plan = synthetic_plan(dtype="float16")
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    activations = synthetic_shard(store, 0)
    position = int(store.mask([2])[0].argmax())
    activations[HOOK][2, position, 0] = 70_000.0
    with pytest.raises(GranaryError, match="context 2 has a value that does not fit float16"):
        store.write_shard(0, activations)
    assert store.committed() == {}
