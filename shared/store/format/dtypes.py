"""Storage types: how an activation lies in the store, in numpy and in torch; and bfloat16 for zarr-python.

zarr-python has no bfloat16. `BFloat16Bits` gives it the registered Zarr extension name ``bfloat16`` over the uint16 bit
pattern, which other Zarr v3 readers (tensorstore, zarrs) read as bfloat16 bit for bit and torch views without a copy.
Importing this module registers it: zarr-python collects the entry points of data types and never loads them.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

from shared.basics.errors import GranaryError

INT8_BLOCK = 128  # values that share one float16 scale; per-token scales are ruined by LLaMA's few huge dimensions

TORCH_SERIAL_ELEMENTS = 32767  # one less than at::internal::GRAIN_SIZE


@dataclass(frozen=True, slots=True)
class StorageType:
    """One choice of ``dtype`` in a store."""

    name: str
    zarr_name: str
    numpy: np.dtype[Any]  # of the bytes on disk; uint16 stands for bfloat16
    storage: torch.dtype  # of the bytes on disk
    read: torch.dtype  # what `read_context` returns
    fill_value: Any  # JSON; a missing shard of a float type must not pass for zeros


STORAGE_TYPES = {
    "bfloat16": StorageType("bfloat16", "bfloat16", np.dtype("<u2"), torch.bfloat16, torch.bfloat16, "NaN"),
    "float16": StorageType("float16", "float16", np.dtype("<f2"), torch.float16, torch.float16, "NaN"),
    "float32": StorageType("float32", "float32", np.dtype("<f4"), torch.float32, torch.float32, "NaN"),
    "int8": StorageType("int8", "int8", np.dtype("i1"), torch.int8, torch.bfloat16, 0),
}


def storage_type(name: str) -> StorageType:
    """The entry called `name`; raises GranaryError for a name that is none."""
    if name not in STORAGE_TYPES:
        raise GranaryError(f"store dtype {name!r} is not known: choose from {', '.join(STORAGE_TYPES)}")
    return STORAGE_TYPES[name]


def scales_per_row(d_model: int) -> int:
    """Number of int8 blocks in one row; the last block is shorter when `d_model` is no multiple of 128."""
    return math.ceil(d_model / INT8_BLOCK)


def row_bytes(dtype: str, d_model: int) -> int:
    """Bytes of one activation in a store of `dtype`, scales of int8 included, before any codec."""
    scales = 2 * scales_per_row(d_model) if dtype == "int8" else 0
    return d_model * storage_type(dtype).numpy.itemsize + scales


@dataclass(frozen=True, kw_only=True)
class BFloat16Bits(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness, HasItemSize):
    """Zarr's ``bfloat16``, in memory the uint16 bit pattern.

    Never inferred from a numpy dtype, so real uint16 arrays stay uint16: it is found by its name in ``zarr.json`` only.
    `HasEndianness` makes the bytes codec say "little", which tensorstore insists on.
    """

    dtype_cls = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        raise DataTypeValidationError(f"{dtype} does not mean bfloat16; pass BFloat16Bits() itself")

    def to_native_dtype(self) -> np.dtypes.UInt16DType:
        return np.dtypes.UInt16DType()

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name!r}")

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format == 2:
            raise ValueError("bfloat16 exists in Zarr v3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.integer | np.floating)

    def cast_scalar(self, data: object) -> np.uint16:
        """A float becomes the nearest bfloat16's bits; an integer is taken as bits already."""
        if isinstance(data, int | np.integer):
            return np.uint16(int(data))
        if isinstance(data, float | np.floating):
            return float_to_bits(float(data))
        raise TypeError(f"{data!r} cannot be stored as bfloat16")

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> np.uint16:
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        return float_to_bits(float(data))  # float() reads "NaN", "Infinity" and "-Infinity" too

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        value = bits_to_float(self.cast_scalar(data))
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


def float_to_bits(value: float) -> np.uint16:
    """Bits of the bfloat16 nearest to `value`, ties to even."""
    return np.uint16(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16).view(torch.uint16).item())


def bits_to_float(bits: np.uint16) -> float:
    """The value of a bfloat16 bit pattern."""
    return float((np.array([bits], np.uint16).astype(np.uint32) << 16).view(np.float32)[0])


def convert(source: torch.Tensor, out: torch.Tensor) -> None:
    """`out.copy_(source)` for [N, D] tensors, on the calling thread alone.

    In pieces below the size from which torch brings in its own threads: the callers are worker threads already.
    """
    rows = max(1, TORCH_SERIAL_ELEMENTS // source.shape[1])
    for out_part, part in zip(out.split(rows), source.split(rows), strict=True):
        out_part.copy_(part)


def register() -> None:
    """Make zarr-python understand ``bfloat16``; calling it again changes nothing."""
    data_type_registry.register(BFloat16Bits._zarr_v3_name, BFloat16Bits)


register()
