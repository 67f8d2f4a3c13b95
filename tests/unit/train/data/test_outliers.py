"""Tokens far above the median norm are left out exactly, of the masks and of the statistics."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.parallel import World
from shared.store import Store
from stage_train.data.outliers import drop_outliers, norm_bounds
from stage_train.data.stores import combined_statistics, pin
from stage_train.data.stream import TrainingData

HOOK = "layers.1.resid_post"
WORLD = World(0, 1, 0, torch.device("cpu"))


def kept(store: Store, bound: float) -> np.ndarray:
    contexts = store.contexts("train").tolist()
    rows = torch.stack([store.read_context(HOOK, context) for context in contexts]).double().numpy()
    mask = store.mask(contexts) & (np.linalg.norm(rows, axis=-1) <= bound)
    return rows[mask]


def test_outliers_leave_masks_and_statistics(planted_store: Callable[..., Store], tmp_path: Path) -> None:
    one = planted_store(tmp_path / "one", outliers=9)
    two = planted_store(tmp_path / "two", seed=3, outliers=5)
    stores = pin([(one.url, 1.0), (two.url, 2.0)], WORLD)
    data = TrainingData([part.slice for part in stores])
    before = data.num_tokens
    parts = [part.store.statistics(HOOK, part.shards) for part in stores]
    bounds = norm_bounds(stores, [HOOK], 10)
    bound = bounds[HOOK]
    assert bound == 10 * combined_statistics(stores, parts).median_norm
    dropped = drop_outliers(data, stores, bounds, [HOOK], WORLD)
    left = [rows.taken_from(HOOK, whole) for rows, whole in zip(dropped, parts, strict=True)]
    rows = [kept(one, bound), kept(two, bound)]
    assert before > data.num_tokens == len(rows[0]) + len(rows[1])
    for statistics, expected in zip(left, rows, strict=True):
        assert statistics.count == len(expected)
        np.testing.assert_allclose(statistics.mean, expected.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics.var, expected.var(0), rtol=1e-4)
        assert statistics.mean_norm == pytest.approx(np.linalg.norm(expected, axis=1).mean(), rel=1e-5)
        assert statistics.rms_norm == pytest.approx(np.sqrt((expected**2).sum(1).mean()), rel=1e-5)
        assert statistics.max_norm <= bound
    both = np.concatenate([rows[0], rows[1], rows[1]])
    combined = combined_statistics(stores, left)
    np.testing.assert_allclose(combined.mean, both.mean(0), atol=1e-5)
    np.testing.assert_allclose(combined.var, both.var(0), rtol=1e-4)
    for row in range(data.num_contexts):
        source, context = data.locate(row)
        assert isinstance(source.store, Store)
        norms = source.store.read_context(HOOK, context).norm(dim=1)[torch.from_numpy(data.positions(row))]
        assert bool((norms <= bound * 1.0001).all())


def test_shards_without_outliers_are_not_read(
    planted_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = planted_store(tmp_path / "store")
    stores = pin([(store.url, 1.0)], WORLD)
    data = TrainingData([part.slice for part in stores])
    statistics = store.statistics(HOOK)
    monkeypatch.setattr(Store, "read_context", None)
    (dropped,) = drop_outliers(data, stores, {HOOK: statistics.max_norm}, [HOOK], WORLD)
    left = dropped.taken_from(HOOK, statistics)
    np.testing.assert_array_equal(left.mean, statistics.mean)
    assert data.num_tokens == statistics.count


def test_nothing_left_is_one_line(planted_store: Callable[..., Store], tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store")
    stores = pin([(store.url, 1.0)], WORLD)
    data = TrainingData([part.slice for part in stores])
    with pytest.raises(GranaryError, match="leaves no token"):
        drop_outliers(data, stores, {HOOK: -1.0}, [HOOK], WORLD)
