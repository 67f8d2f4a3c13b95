"""``zarr.json`` of every group and array of a store, made by zarr-python so that any Zarr v3 reader takes them."""

import json
from collections.abc import Sequence
from typing import Any

from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.dtype import Bool, Float16, Float32, Float64, Int8, Int16, Int32, UInt8, UInt16, UInt32, UInt64, ZDType

from shared.store.format import layout
from shared.store.format.dtypes import INT8_BLOCK, BFloat16Bits, scales_per_row, storage_type
from shared.store.format.layout import StorePlan
from shared.store.format.shard import BLOSC
from shared.store.format.site_path import scale_path, site_path

ZARR_TYPES: dict[str, ZDType[Any, Any]] = {
    "bfloat16": BFloat16Bits(),
    "float16": Float16(),
    "float32": Float32(),
    "float64": Float64(),
    "int8": Int8(),
    "int16": Int16(),
    "int32": Int32(),
    "uint8": UInt8(),
    "uint16": UInt16(),
    "uint32": UInt32(),
    "uint64": UInt64(),
    "bool": Bool(),
}


def metadata_documents(plans: Sequence[StorePlan], num_contexts: int, num_shards: int) -> dict[str, str]:
    """Key to text of each ``zarr.json`` of a store of that many contexts, the root group's last.

    `plans` are that of the first harvest and those of the harvests that extended it.
    """
    plan = plans[0]
    documents: dict[str, str] = {}

    def add_array(path: str, **spec: Any) -> None:
        for depth in range(1, path.count("/") + 1):
            group = "/".join(path.split("/")[:depth])
            documents[f"{group}/zarr.json"] = group_document({})
        documents[f"{path}/zarr.json"] = array_document(**spec)

    S, T, B = num_contexts, plan.seq_len, plan.shard_contexts
    for path, array in plan.token_arrays.items():
        beyond = array.beyond
        add_array(
            path, dtype=array.dtype, fill=False if array.dtype == "bool" else 0, shape=(S, T, *beyond),
            shard=(B, T, *beyond), chunk=(1, T, *beyond), names=("sequence", "position", *array.names),
        )  # fmt: skip
    for hook, D in plan.hooks.items():
        common: dict[str, Any] = {"codec": plan.codec, "names": ("sequence", "position", "d_model")}
        kind = storage_type(plan.dtype)
        attributes: dict[str, Any] = {"hook": hook}
        if plan.dtype == "int8":
            G = scales_per_row(D)
            attributes |= {"scale": scale_path(hook), "block": INT8_BLOCK}
            add_array(
                scale_path(hook), dtype="float16", fill="NaN", shape=(S, T, G), shard=(B, T, G),
                chunk=(1, plan.chunk_rows, G), attributes={"scale_of": site_path(hook)},
                **{**common, "names": ("sequence", "position", "block")},
            )  # fmt: skip
        add_array(
            site_path(hook), dtype=kind.zarr_name, fill=kind.fill_value, shape=(S, T, D), shard=(B, T, D),
            chunk=(1, plan.chunk_rows, D), attributes=attributes, **common,
        )  # fmt: skip
        add_array(
            layout.statistics_path(hook), dtype="float64", fill="NaN", shape=(num_shards, 2, D), shard=None,
            chunk=(1, 2, D), names=("shard", "moment", "d_model"), attributes={"moment": ["mean", "M2"]},
        )  # fmt: skip
    documents["zarr.json"] = group_document(group_attributes(plans))
    return documents


def document_keys(plan: StorePlan) -> set[str]:
    """The keys of `metadata_documents` of a store of `plan`."""
    arrays = {*plan.token_arrays, *layout.shard_arrays(plan)}
    groups = {path.rsplit("/", depth)[0] for path in arrays for depth in range(1, path.count("/") + 1)}
    return {"zarr.json", *(f"{path}/zarr.json" for path in arrays | groups)}


def group_attributes(plans: Sequence[StorePlan]) -> dict[str, Any]:
    """What the root group says of the store: the identity, the versions, the plan's hash, and the extensions."""
    plan, *extensions = plans
    attributes = {"granary_format": layout.FORMAT_VERSION, "plan_hash": plan.hash(), **plan.to_json()}
    if extensions:
        attributes["extensions"] = [{"plan_hash": plan.hash(), **plan.to_json()} for plan in extensions]
    return attributes


def array_document(
    *,
    dtype: str,
    fill: Any,
    shape: Sequence[int],
    shard: Sequence[int] | None,
    chunk: Sequence[int],
    names: Sequence[str],
    codec: str = "none",
    attributes: dict[str, Any] | None = None,
) -> str:
    """``zarr.json`` of an array; `shard` None: each chunk is an object of its own."""
    kind = ZARR_TYPES[dtype]
    inner: list[Any] = [BytesCodec(endian=None if kind.to_native_dtype().itemsize == 1 else "little")]
    if codec != "none":
        name, level = BLOSC[codec]
        typesize = kind.to_native_dtype().itemsize
        inner.append(BloscCodec(cname=name, clevel=level, shuffle="bitshuffle", typesize=typesize))
    inner.append(Crc32cCodec())
    codecs = inner if shard is None else [ShardingCodec(chunk_shape=tuple(chunk), codecs=inner)]
    outer = chunk if shard is None else shard
    metadata = ArrayV3Metadata(
        shape=tuple(shape),
        data_type=kind,
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": list(outer)}},
        chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}},
        fill_value=kind.from_json_scalar(fill, zarr_format=3),
        codecs=codecs,
        attributes=attributes or {},
        dimension_names=tuple(names),
    )
    return _text(metadata)


def group_document(attributes: dict[str, Any]) -> str:
    """``zarr.json`` of a group."""
    return _text(GroupMetadata(attributes=attributes, zarr_format=3))


def _text(metadata: ArrayV3Metadata | GroupMetadata) -> str:
    data = metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
    return json.dumps(json.loads(data), indent=2)
