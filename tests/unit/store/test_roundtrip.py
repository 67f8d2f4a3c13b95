"""What goes in comes out: every storage type and codec, any shape, and through readers that are not ours."""

import asyncio

import numpy as np
import pytest
import tensorstore
import torch
import zarr
import zarrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.format.dtypes import scales_per_row, storage_type
from shared.store.format.quantise import quantise
from tests.examples import examples
from tests.synthetic import (
    synthetic_context,
    synthetic_plan,
    synthetic_shard,
    synthetic_store,
    synthetic_tokens,
)

DTYPES = ("bfloat16", "float16", "float32", "int8")
CODECS = ("none", "lz4", "zstd")
HOOK = "layers.2.resid_post"


def as_read(x_TD, dtype):
    """What a store of `dtype` gives back for float32 rows."""
    if dtype != "int8":
        return x_TD.to(storage_type(dtype).read)
    q_TD = torch.empty(x_TD.shape, dtype=torch.int8)
    scale_TG = torch.empty(len(x_TD), scales_per_row(x_TD.shape[1]), dtype=torch.float16)
    quantise(x_TD, q_TD, scale_TG)
    return from_int8(q_TD, scale_TG)


def from_int8(q_TD, scale_TG):
    """Plain product of int8 values and their scales, as bfloat16."""
    step_TD = scale_TG.float().repeat_interleave(128, dim=1)[:, : q_TD.shape[1]]
    return (q_TD.float() * step_TD).to(torch.bfloat16)


def as_float(array):
    """Values that zarr-python read, bfloat16 bits widened."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array).view(torch.bfloat16).float()
    return torch.from_numpy(array).float()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_and_codec_survives_bit_for_bit_and_zarr_reads_it(tmp_path, dtype, codec):
    plan = synthetic_plan(dtype=dtype, codec=codec)
    store = synthetic_store(tmp_path, plan)
    array = zarr.open_group(tmp_path, mode="r")["layers/2/resid_post"]
    assert array.metadata.dimension_names == ("sequence", "position", "d_model")
    assert array.shape == (10, 64, 130)
    for context in range(plan.num_contexts):
        expected = as_read(synthetic_context(plan, HOOK, context), dtype)
        out = torch.empty(64, 130, dtype=store.read_dtype)
        assert store.read_context(HOOK, context, out) is out
        assert torch.equal(out, expected)
    if dtype == "int8":
        scale = zarr.open_group(tmp_path, mode="r")[array.attrs["scale"]]
        rows = torch.from_numpy(array[:]).view(-1, 130), torch.from_numpy(scale[:]).view(-1, 2)
        whole = from_int8(*rows).float().view(10, 64, 130)
    else:
        whole = as_float(array[:])
        assert torch.equal(as_float(array[5, 17:19, 3:77]), whole[5, 17:19, 3:77]), "a partial read of a shard"
    expected = torch.stack([as_read(synthetic_context(plan, HOOK, c), dtype) for c in range(10)])
    assert torch.equal(whole, expected.float())


def test_tokens_mask_and_segments_survive_and_zarr_reads_them(tmp_path):
    plan = synthetic_plan()
    tokens, mask, segments = synthetic_tokens(plan)
    store = synthetic_store(tmp_path, plan)
    group = zarr.open_group(tmp_path, mode="r")
    for name, wanted in (("tokens", tokens), ("mask", mask), ("segments", segments)):
        read = getattr(store, name)(range(10))
        assert read.dtype == wanted.dtype
        np.testing.assert_array_equal(read, wanted)
        np.testing.assert_array_equal(group[name][:], wanted)
        np.testing.assert_array_equal(getattr(store, name)([9, 0, 5, 5]), wanted[[9, 0, 5, 5]])
    trainable = [count for record in store.committed().values() for count in record.trainable]
    np.testing.assert_array_equal(trainable, mask.sum(axis=1))


def test_a_tensor_of_the_stored_dtype_and_one_that_is_converted_make_the_same_store(tmp_path):
    plan = synthetic_plan()
    one = synthetic_store(tmp_path / "one", plan)
    two = Store.create(tmp_path / "two", plan, *synthetic_tokens(plan))
    for shard in two.pending():
        activations = synthetic_shard(two, shard)
        strided = activations[HOOK].to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
        two.write_shard(shard, {HOOK: strided})
    for context in range(10):
        assert torch.equal(one.read_context(HOOK, context), two.read_context(HOOK, context))
    assert one.statistics(HOOK).relative_squared_error > 0
    assert two.statistics(HOOK).relative_squared_error == 0


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_same_store_at_every_kind_of_url(tmp_path, scheme):
    plan = synthetic_plan(codec="lz4")
    url = f"{scheme}://{tmp_path}/store"
    store = synthetic_store(url, plan)
    assert store.digest() == synthetic_store(tmp_path / "other", plan).digest()
    assert Store.open(url).finalize()["shards"] == 3
    assert torch.equal(store.read_context(HOOK, 7), as_read(synthetic_context(plan, HOOK, 7), "bfloat16"))


@settings(max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_contexts=st.integers(1, 9),
    seq_len=st.integers(1, 40),
    d_model=st.sampled_from([1, 2, 31, 128, 131]),
    shard_contexts=st.integers(1, 6),
    chunk_tokens=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(CODECS),
    order=st.randoms(use_true_random=False),
)
def test_any_shape_survives(
    tmp_path_factory, num_contexts, seq_len, d_model, shard_contexts, chunk_tokens, dtype, codec, order
):
    plan = synthetic_plan(
        num_contexts=num_contexts, seq_len=seq_len, d_model=d_model, shard_contexts=shard_contexts,
        chunk_tokens=chunk_tokens, dtype=dtype, codec=codec, heldout_fraction=0.0,
    )  # fmt: skip
    store = Store.create(tmp_path_factory.mktemp("any"), plan, *synthetic_tokens(plan))
    shards = store.pending()
    order.shuffle(shards)
    for shard in shards:
        store.write_shard(shard, synthetic_shard(store, shard))
    assert store.pending() == []
    store = Store.open(store.url)
    assert store.contexts("all").tolist() == list(range(num_contexts))
    for context in range(num_contexts):
        expected = as_read(synthetic_context(plan, HOOK, context), dtype)
        assert torch.equal(store.read_context(HOOK, context), expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorstore_reads_it_bit_for_bit(tmp_path, dtype, codec):
    store = synthetic_store(tmp_path, synthetic_plan(dtype=dtype, codec=codec))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/layers/2/resid_post/"}}
    array = tensorstore.open(spec, open=True).result()
    assert array.dtype.name == dtype
    found = array.read().result()
    if dtype == "bfloat16":
        assert torch.equal(
            torch.from_numpy(found.view(np.uint16)).view(torch.bfloat16),
            torch.stack([store.read_context(HOOK, c) for c in range(10)]),
        )
    else:
        ours = zarr.open_group(tmp_path, mode="r")["layers/2/resid_post"][:]
        np.testing.assert_array_equal(found.view(ours.dtype), ours)


@pytest.mark.parametrize("codec", CODECS)
def test_zarrs_reads_it_bit_for_bit(tmp_path, codec):
    store = synthetic_store(tmp_path, synthetic_plan(codec=codec))
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(pipeline):
        array = zarr.open_group(tmp_path, mode="r")["layers/2/resid_post"]
        found = array[:]
    assert isinstance(array.async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
    ours = torch.stack([store.read_context(HOOK, c) for c in range(10)])
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), ours)


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
def test_zarr_lists_every_array_and_reads_a_missing_shard_as_nan(tmp_path):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    store.write_shard(0, synthetic_shard(store, 0))

    async def members():
        group = await zarr.api.asynchronous.open_group(tmp_path, mode="r")
        return {name async for name, _ in group.members(max_depth=None)}

    names = asyncio.run(members())
    assert {"tokens", "mask", "segments", "layers/2/resid_post", "statistics/layers/2/resid_post"} <= names
    values = as_float(zarr.open_group(tmp_path, mode="r")["layers/2/resid_post"][:])
    assert not values[:4].isnan().any()
    assert values[4:].isnan().all()


@pytest.mark.parametrize(
    ("out", "named"),
    [
        (torch.empty(64, 130), "float32"),
        (torch.empty(63, 130, dtype=torch.bfloat16), "63"),
        (torch.empty(130, 64, dtype=torch.bfloat16).T, "buffer"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(tmp_path, out, named):
    store = synthetic_store(tmp_path, synthetic_plan())
    with pytest.raises(GranaryError, match=named):
        store.read_context(HOOK, 0, out)


def test_what_is_not_there_is_refused_by_name(tmp_path):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    with pytest.raises(GranaryError, match=r"no hook layers\.9"):
        store.read_context("layers.9.resid_post", 0)
    with pytest.raises(GranaryError, match="context 10 is not in the store"):
        store.read_context(HOOK, 10)
    with pytest.raises(GranaryError, match=r"shard 1 .* is not committed yet"):
        store.read_context(HOOK, 4)
    with pytest.raises(GranaryError, match="no committed training shard"):
        store.statistics(HOOK)
    with pytest.raises(GranaryError, match=r"3 of 3 shards .* missing"):
        store.finalize()
    with pytest.raises(GranaryError, match="split 'test'"):
        store.contexts("test")


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_memory_that_goes_round_while_a_long_shard_is_written_is_not_read_twice(tmp_path, scheme):
    plan = synthetic_plan(num_contexts=16, shard_contexts=16, dtype="float16", heldout_fraction=0.0)
    store = synthetic_store(f"{scheme}://{tmp_path}/store", plan)
    for context in range(16):
        expected = synthetic_context(plan, HOOK, context).half()
        assert torch.equal(store.read_context(HOOK, context), expected)
