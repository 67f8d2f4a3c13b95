"""The plan: what it refuses, what identifies it, and the pure functions of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.store import bytes_planned
from shared.store.format.layout import describe_difference, extension_identity, object_key, shard_arrays
from tests.synthetic import synthetic_plan


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bf16"}, "bf16"),
        ({"codec": "gzip"}, "gzip"),
        ({"hooks": {}}, "at least one hook"),
        ({"hooks": {"layers.2..resid": 8}}, "a part of it is empty"),
        ({"hooks": {"layers.2.resid_post": 0}}, "d_model >= 1, not 0"),
        ({"num_contexts": 0}, "num_contexts"),
        ({"shard_contexts": 0}, "shard_contexts"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"heldout_placement": "first"}, "first"),
        ({"shard_contexts": 100}, "none can be held out"),
        ({"provenance": {"model": object()}}, "JSON"),
    ],
)
def test_a_plan_that_makes_no_sense_is_one_clear_line(changes, named):
    with pytest.raises(GranaryError, match=named) as caught:
        synthetic_plan(**changes)
    assert "\n" not in str(caught.value)


@given(
    shards=st.integers(2, 300),
    fraction=st.floats(0.001, 0.99),
    placement=st.sampled_from(["spread", "last"]),
)
def test_heldout_shards_are_distinct_never_none_and_never_all(shards, fraction, placement):
    plan = synthetic_plan(num_contexts=4 * shards, heldout_fraction=fraction, heldout_placement=placement)
    held = plan.heldout_shards
    assert held == plan.heldout_shards
    assert len(set(held)) == len(held) == min(max(1, round(fraction * shards)), shards - 1)
    assert min(held) >= 0
    assert max(held) < shards
    if placement == "last":
        assert max(held) == shards - 1
        assert max(held) - min(held) == len(held) - 1
    elif len(held) > 1:
        gaps = [b - a for a, b in pairwise(held)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("recorded", [{"mode": "sideways"}, {"mode": None}, {"mode": ["joined"]}, "joined", None])
def test_a_packing_that_is_not_known_is_one_clear_line(recorded):
    assert synthetic_plan(provenance={}).packing == "isolated"
    assert synthetic_plan(provenance={"packing": {"mode": "separate"}}).packing == "separate"
    with pytest.raises(GranaryError, match="is not known: choose from isolated, joined, separate"):
        synthetic_plan(provenance={"packing": recorded}).packing  # noqa: B018


def test_no_share_holds_out_nothing():
    assert synthetic_plan(heldout_fraction=0.0).heldout_shards == ()


@pytest.mark.parametrize(
    ("seq_len", "wish", "rows"),
    [(4096, 1024, 1024), (512, 1024, 512), (4096, 1000, 1024), (509, 64, 509), (1000, 64, 50), (96, 40, 48), (1, 7, 1)],
)
def test_chunks_divide_the_context(seq_len, wish, rows):
    plan = synthetic_plan(seq_len=seq_len, chunk_tokens=wish)
    assert plan.chunk_rows == rows
    assert plan.chunks_per_context * rows == seq_len


def test_versions_are_no_part_of_the_identity_and_all_else_is():
    plan = synthetic_plan()
    assert plan.hash() == synthetic_plan(versions={"torch": "3"}).hash()
    assert plan.hash() == synthetic_plan(chunk_tokens=17).hash(), "both wishes make chunks of 16"
    changes = {
        "num_contexts": 11, "seq_len": 128, "hooks": {"layers.3.resid_post": 130}, "dtype": "float16",
        "shard_contexts": 5, "chunk_tokens": 32, "codec": "lz4", "heldout_fraction": 0.3,
        "heldout_placement": "spread", "provenance": {"model": {"id": "other"}},
    }  # fmt: skip
    hashes = {synthetic_plan(**{name: value}).hash() for name, value in changes.items()} | {plan.hash()}
    assert len(hashes) == len(changes) + 1


def test_the_hash_and_the_keys_of_a_plan_are_those_of_every_store_there_is():
    plan = synthetic_plan()
    assert plan.hash() == "5ddc58927380579f0fdcf8d547782118bd405f3f08e5000e314e3de6a48bc730"
    assert shard_arrays(plan) == {"layers/2/resid_post", "statistics/layers/2/resid_post"}
    assert object_key("layers/2/resid_post", 7, 3) == "layers/2/resid_post/c/7/0/0"
    assert shard_arrays(synthetic_plan(dtype="int8")) == shard_arrays(plan) | {"layers/2/resid_post_scale"}


def test_a_difference_names_each_leaf_with_both_values():
    one, two = synthetic_plan(), synthetic_plan(dtype="float16", provenance={"model": {"id": "other"}})
    text = describe_difference(one.identity(), two.identity())
    assert "dtype is bfloat16, not float16" in text
    assert "provenance.model.id is synthetic, not other" in text
    assert "provenance.corpus.description is synthetic, not absent" in text
    assert "seq_len" not in text


def test_an_extension_may_differ_in_corpus_length_and_split_only():
    plan = synthetic_plan()
    other = synthetic_plan(
        num_contexts=99, heldout_fraction=0.0, provenance={"model": {"id": "synthetic"}, "corpus": {"hash": "x"}}
    )
    assert extension_identity(plan) == extension_identity(other)
    assert extension_identity(plan) != extension_identity(synthetic_plan(provenance={"model": {"id": "other"}}))


def test_bytes_planned_counts_what_dominates():
    plan = synthetic_plan(num_contexts=32, seq_len=4096, d_model=4096, shard_contexts=32, heldout_fraction=0.0)
    activations = 32 * 4096 * 4096 * 2
    assert activations < bytes_planned(plan) < 1.01 * activations
