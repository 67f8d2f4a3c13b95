"""Writing safetensors one tensor at a time, with a digest of each, so that no more than one needs to be in memory.

The format: 8 bytes with the header's length (little endian), the header as JSON, the tensors' bytes in turn.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import BinaryIO

import torch
from torch import Tensor

from shared.basics.errors import GranaryError

DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
# Bytes that a write hands over at a time.
CHUNK_BYTES = 1 << 26
READ_BYTES = 1 << 20
# As safetensors itself allows.
MAX_HEADER_BYTES = 100_000_000
# As long as a digest, where there is none yet.
NO_DIGEST = "0" * 64

Digests = Mapping[str, str]
"""By name of a tensor, the SHA-256, in hexadecimal, of its type, shape and bytes."""


def write_weights(
    file: BinaryIO,
    shapes: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor | Iterable[Tensor]],
    metadata: Callable[[Digests], Mapping[str, str]],
) -> dict[str, str]:
    """Fill an empty `file`; returns the digests of its tensors.

    `shapes` may lie on the meta device; `fetch` gives a tensor's values when it is its turn, at once or in blocks of
    rows. `metadata` is asked for twice, before the tensors with `NO_DIGEST` for each and after them; both answers must
    be equally long. Raises GranaryError for a tensor of another type or shape than announced.
    """
    names = sorted(shapes)
    header = _header(shapes, metadata(dict.fromkeys(names, NO_DIGEST)))
    file.write(header)
    digests = {}
    for name in names:
        digest = _begun(DTYPES[shapes[name].dtype], shapes[name].shape)
        for block in _blocks(name, fetch(name), shapes[name]):
            for piece in _pieces(block):
                digest.update(piece)
                file.write(piece)
            del block
        digests[name] = digest.hexdigest()
    final = _header(shapes, metadata(digests))
    assert len(final) == len(header)
    if final != header:
        file.seek(0)
        file.write(final)
    return digests


def header_digest(file: BinaryIO) -> str:
    """SHA-256, in hexadecimal, of all before the tensors. Raises ValueError where a file holds no such thing."""
    file.seek(0)
    return sha256(read_header(file)).hexdigest()


def digests_in(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """(name, digest) of each tensor of a file, read in pieces. Raises ValueError where a file holds no such thing."""
    file.seek(0)
    try:
        header = json.loads(read_header(file)[8:])
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    first = file.tell()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        file.seek(first + begin)
        digest = _begun(entry["dtype"], entry["shape"])
        for start in range(begin, end, READ_BYTES):
            digest.update(file.read(min(READ_BYTES, end - start)))
        yield name, digest.hexdigest()


def read_header(file: BinaryIO) -> bytes:
    """The length of the header and the header; raises ValueError for one that is too long."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    return length + file.read(size)


def _begun(dtype: str, shape: Sequence[int]) -> "hashlib._Hash":
    return sha256(f"{dtype} {list(shape)}\n".encode())


def _blocks(name: str, given: Tensor | Iterable[Tensor], told: Tensor) -> Iterator[Tensor]:
    """A tensor, or blocks of its rows, on the host. Raises GranaryError where that is not what was announced."""
    rows, is_whole = 0, isinstance(given, Tensor)
    for block in [given] if isinstance(given, Tensor) else given:
        if block.dtype != told.dtype or block.shape[1:] != told.shape[1:] or (is_whole and block.shape != told.shape):
            raise GranaryError(f"{name} is {block.dtype} {list(block.shape)}, not as announced")
        rows += block.shape[:1].numel()
        yield block.detach().cpu().contiguous()
    if rows != told.shape[:1].numel():
        raise GranaryError(f"{name} has {rows} rows, not as announced")


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].data


def _header(shapes: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length of the header and the header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(shapes):
        tensor = shapes[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
