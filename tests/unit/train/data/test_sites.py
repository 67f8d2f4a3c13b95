"""What is read and written: keys to sites, aligned samples and batches, outliers at any site that is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae.sites import Sites, side_by_side
from shared.store import Store
from stage_train.data.outliers import drop_outliers, norm_bounds
from stage_train.data.sites import resolve_sites, site_formats
from stage_train.data.stores import PinnedStore, pin
from stage_train.data.stream import StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.sample import sample_tokens
from tests.synthetic import synthetic_plan, synthetic_tokens
from tests.training import WORLD

WIDTHS = {"layers.0.mlp_in": 3, "layers.0.mlp_out": 2, "layers.1.mlp_in": 3, "layers.1.mlp_out": 2}
IN0, OUT0, IN1, OUT1 = WIDTHS


def make_store(folder: Path, widths: dict[str, int] | None = None, dtype: str = "float32", norms: Any = None) -> Store:
    """Rows begin with (context, position); `norms` [S, T] of a site's rows in place of that, by its name."""
    plan = synthetic_plan(hooks=widths or WIDTHS, dtype=dtype, num_contexts=12, seq_len=8, heldout_fraction=0.0)
    store = Store.create(folder, plan, *synthetic_tokens(plan))
    for shard in store.pending():
        contexts = store.shard_contexts(shard)
        rows = {}
        for site, width in plan.hooks.items():
            rows[site] = torch.zeros(len(contexts), plan.seq_len, width)
            rows[site][:, :, 0] = torch.tensor(list(contexts))[:, None]
            rows[site][:, :, 1] = torch.arange(plan.seq_len)
            if norms is not None and site in norms:
                rows[site][:] = 0
                rows[site][:, :, 0] = torch.from_numpy(norms[site][list(contexts)])
        store.write_shard(shard, {site: row.to(store.read_dtype) for site, row in rows.items()})
    return store


def pinned(*stores: Store) -> list[PinnedStore]:
    return pin([(store.url, 1.0) for store in stores], WORLD)


def keys(hook: Any = None, reads: Any = None, writes: Any = None) -> Any:
    return SimpleNamespace(hook=hook, reads=reads, writes=writes, variant={"kind": "sae"})


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        (keys(hook=IN1), Sites.of(IN1)),
        (keys(reads=IN1), Sites.of(IN1)),
        (keys(reads=IN1, writes=OUT1), Sites((IN1,), (OUT1,))),
        (keys(reads=[IN1, IN0], writes=OUT0), Sites((IN1, IN0), (OUT0,))),
        (keys(reads="layers.*.mlp_in", writes="layers.?.mlp_out"), Sites((IN0, IN1), (OUT0, OUT1))),
        (keys(reads=["layers.1.*", IN0]), Sites.of(IN1, OUT1, IN0)),
    ],
)
def test_keys_name_sites(tmp_path: Path, cfg: Any, wanted: Sites) -> None:
    assert resolve_sites(cfg, pinned(make_store(tmp_path / "store"))) == wanted


def test_the_only_site_needs_no_name(tmp_path: Path) -> None:
    assert resolve_sites(keys(), pinned(make_store(tmp_path / "store", {IN0: 3}))) == Sites.of(IN0)


@pytest.mark.parametrize(
    ("cfg", "line"),
    [
        (keys(), r"has several hooks: choose hook=layers\.0\.mlp_in \| layers\.0\.mlp_out"),
        (keys(hook=IN0, reads=IN1), "hook is short for reading and writing the same"),
        (keys(hook=IN0, writes=IN1), "hook is short for reading and writing the same"),
        (keys(writes=IN1), r"writes=layers\.1\.mlp_in without reads"),
        (keys(reads="layers.7.mlp_in"), r"site layers\.7\.mlp_in is not in the store at .*: it has layers\.0"),
        (keys(reads="blocks.*"), r"reads=blocks\.\* matches no site of the store"),
        (keys(reads=[IN0, "layers.0.*"]), r"a dictionary reads layers\.0\.mlp_in twice"),
        (keys(reads=[]), r"reads=\[\]: give a site of the store"),
        (keys(reads=7), "reads=7: give a site of the store"),
    ],
)
def test_what_names_no_site_is_one_line(tmp_path: Path, cfg: Any, line: str) -> None:
    with pytest.raises(GranaryError, match=line) as error:
        resolve_sites(cfg, pinned(make_store(tmp_path / "store")))
    assert "\n" not in str(error.value)


def test_stores_agree_on_every_site(tmp_path: Path) -> None:
    one = make_store(tmp_path / "one")
    half = make_store(tmp_path / "half", dtype="float16")
    fewer = make_store(tmp_path / "fewer", {IN0: 3, OUT0: 2})
    cfg = keys(reads=IN1, writes=OUT1)
    with pytest.raises(GranaryError, match=r"site layers\.1\.mlp_in is not in the store at .*fewer"):
        resolve_sites(cfg, pinned(one, fewer))
    with pytest.raises(GranaryError, match=r"the stores hold layers\.1\.mlp_in with different widths or dtypes"):
        site_formats((IN1, OUT1), pinned(one, half))
    assert site_formats((OUT1, IN1, OUT1), pinned(one, one)) == {OUT1: (2, torch.float32), IN1: (3, torch.float32)}


def test_samples_and_batches_of_sites_are_the_same_tokens(tmp_path: Path) -> None:
    stores = pinned(make_store(tmp_path / "store"))
    data = TrainingData([part.slice for part in stores])
    formats = site_formats((IN0, IN1, OUT1), stores)
    sample = sample_tokens(data, formats, 50, seed=3)
    assert len(sample[IN0]) > 20
    alone = sample_tokens(data, {IN1: formats[IN1]}, 50, seed=3)
    assert torch.equal(alone[IN1], sample[IN1])
    x_MD = side_by_side(sample, (IN0, IN1))
    assert x_MD.shape == (len(sample[IN0]), 6)
    assert torch.equal(x_MD[:, :2], x_MD[:, 3:5])
    assert torch.equal(x_MD[:, :2], sample[OUT1])
    assert side_by_side(sample, (IN0,)) is sample[IN0]
    with TokenStream(data, formats, StreamOrder(batch_size=7, seed=0, lanes=2)) as stream:
        stream.stop_at(1, 0)
        for batch in stream:
            x_ND, y_ND = side_by_side(batch.activations, (IN1, IN0)), side_by_side(batch.activations, (OUT1,))
            assert torch.equal(x_ND[:, :2], y_ND)
            assert torch.equal(x_ND[:, 3:5], y_ND)
            assert y_ND is batch.activations[OUT1]


def test_a_token_that_is_an_outlier_at_any_site_read_is_dropped(tmp_path: Path) -> None:
    """Not one that is so where it is only written; statistics at every site are those of what is left."""
    rng = np.random.default_rng(0)
    norms = {site: rng.uniform(1, 2, (12, 8)).astype(np.float32) for site in WIDTHS}
    norms[IN0][2, 1:4] = 100
    norms[IN1][2, 3:5] = 90
    norms[OUT0][7, :] = 80
    stores = pinned(make_store(tmp_path / "store", norms=norms))
    (store,) = (part.store for part in stores)
    data = TrainingData([part.slice for part in stores])
    contexts = stores[0].slice.contexts
    left_ST = store.mask(contexts)
    for site in (IN0, IN1):
        left_ST = left_ST & (norms[site][contexts] < 50)
    bounds = norm_bounds(stores, (IN0, IN1), 10)
    (dropped,) = drop_outliers(data, stores, bounds, (IN0, IN1, OUT0), WORLD)
    assert data.num_tokens == left_ST.sum() < store.mask(contexts).sum()
    for row in range(data.num_contexts):
        assert data.positions(row).tolist() == np.flatnonzero(left_ST[row]).tolist()
    for site in (IN0, IN1, OUT0):
        left = dropped.taken_from(site, store.statistics(site))
        values = norms[site][contexts][left_ST].astype(np.float64)
        assert left.count == len(values)
        assert left.mean[0] == pytest.approx(values.mean(), rel=1e-5)
        assert left.var[0] == pytest.approx(values.var(), rel=1e-3)
        assert left.max_norm >= values.max() * (1 - 1e-6)
