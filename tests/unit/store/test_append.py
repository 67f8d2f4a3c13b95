"""Harvesting more contexts into a store that exists."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.verify import drop_incomplete, verify
from tests.synthetic import synthetic_context, synthetic_plan, synthetic_shard, synthetic_store, synthetic_tokens

HOOK = "layers.2.resid_post"


def longer(num_contexts=6, **changes):
    corpus = {"model": {"id": "synthetic"}, "corpus": {"description": "more"}}
    return synthetic_plan(num_contexts=num_contexts, provenance=corpus, heldout_fraction=0.4, **changes)


def fill(store):
    for shard in store.pending():
        store.write_shard(shard, synthetic_shard(store, shard))
    return store.finalize()


def test_the_new_contexts_follow_at_the_next_whole_shard(tmp_path):
    first = synthetic_store(tmp_path, synthetic_plan())
    before = first.digest()
    plan = longer()
    tokens, mask, segments = synthetic_tokens(plan, seed=1)
    store = Store.append(tmp_path, plan, tokens, mask, segments)
    assert not store.complete
    assert store.pending() == [3, 4]
    assert fill(store)["contexts"] == 16
    store = Store.open(tmp_path)
    assert store.complete
    assert store.contexts("all").tolist() == [*range(10), *range(12, 18)]  # the old last shard was 2 contexts short
    assert store.contexts("heldout").tolist() == [8, 9, 16, 17], "what was held out stays held out"
    np.testing.assert_array_equal(store.tokens(range(12, 18)), tokens)
    trainable = [count for shard in (3, 4) for count in store.committed()[shard].trainable]
    np.testing.assert_array_equal(trainable, mask.sum(axis=1))
    assert torch.equal(store.read_context(HOOK, 13), synthetic_context(plan, HOOK, 13).bfloat16())
    with pytest.raises(GranaryError, match="context 10 is not in the store"):
        store.read_context(HOOK, 10)
    assert store.digest([0, 1, 2]) == before
    assert store.statistics(HOOK).count == int(store.mask(store.contexts("train")).sum())
    array = zarr.open_group(tmp_path, mode="r")["layers/2/resid_post"]
    assert array.shape == (18, 64, 130)
    values = torch.from_numpy(array[:]).view(torch.bfloat16)
    assert values[10:12].isnan().all()
    assert torch.equal(values[17], store.read_context(HOOK, 17))
    assert verify(str(tmp_path)).intact


def test_appending_the_same_again_opens_it_and_different_ones_follow_each_other(tmp_path):
    synthetic_store(tmp_path, synthetic_plan())
    plan = longer()
    Store.append(tmp_path, plan, *synthetic_tokens(plan))
    store = Store.append(tmp_path, plan, *synthetic_tokens(plan))
    assert store.pending() == [3, 4]
    third = longer(num_contexts=8)
    store = Store.append(tmp_path, third, *synthetic_tokens(third))
    assert store.pending() == [3, 4, 5, 6]
    fill(store)
    assert verify(str(tmp_path)).intact
    again = synthetic_plan()
    assert Store.create(tmp_path, again, *synthetic_tokens(again)).num_shards == 7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float16"}, "dtype is bfloat16, not float16"),
        ({"d_model": 64}, r"hooks\.layers\.2\.resid_post is 130, not 64"),
        ({"seq_len": 32}, "seq_len is 64, not 32"),
        ({"shard_contexts": 2}, "shard_contexts is 4, not 2"),
    ],
)
def test_another_format_is_refused_by_name(tmp_path, changes, named):
    synthetic_store(tmp_path, synthetic_plan())
    plan = longer(**changes)
    with pytest.raises(GranaryError, match=f"cannot be extended by this harvest: .*{named}"):
        Store.append(tmp_path, plan, *synthetic_tokens(plan))


def test_another_model_is_refused_by_name(tmp_path):
    synthetic_store(tmp_path, synthetic_plan())
    plan = synthetic_plan(num_contexts=8, provenance={"model": {"id": "other"}})
    with pytest.raises(GranaryError, match=r"provenance\.model\.id is synthetic, not other"):
        Store.append(tmp_path, plan, *synthetic_tokens(plan))


def test_an_extension_that_died_is_completed_or_dropped(tmp_path):
    synthetic_store(tmp_path, synthetic_plan())
    plan = longer()
    Store.append(tmp_path, plan, *synthetic_tokens(plan))
    Path(tmp_path / "extents/00000003.tokens.json").unlink()  # as if killed just before
    assert Store.open(tmp_path).num_shards == 3
    other = longer(num_contexts=8)
    with pytest.raises(GranaryError, match=r"another extension .* was begun and not finished"):
        Store.append(tmp_path, other, *synthetic_tokens(other))
    assert Store.append(tmp_path, plan, *synthetic_tokens(plan)).num_shards == 5
    Path(tmp_path / "extents/00000003.tokens.json").unlink()
    drop_incomplete(str(tmp_path))
    assert verify(str(tmp_path)).intact
    assert Store.append(tmp_path, other, *synthetic_tokens(other)).pending() == [3, 4]
