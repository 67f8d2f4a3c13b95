"""Writing safetensors one tensor at a time, so that no more than one needs to be in memory.

The format: 8 bytes with the header's length (little endian), the header as JSON, the tensors' bytes in turn.
"""

import json
from collections.abc import Callable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from shared.basics.errors import GranaryError

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
# Bytes that a write hands over at a time.
CHUNK_BYTES = 1 << 26


def write_weights(
    file: BinaryIO, shapes: Mapping[str, Tensor], fetch: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Fill an empty `file`. `shapes` may lie on the meta device; `fetch` gives a tensor's values when it is its turn.

    Raises GranaryError for a tensor of another type or shape than announced.
    """
    names = sorted(shapes)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = shapes[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        tensor = fetch(name).detach().cpu().contiguous()
        if tensor.shape != shapes[name].shape or tensor.dtype != shapes[name].dtype:
            raise GranaryError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as announced")
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), CHUNK_BYTES):
            file.write(flat[start : start + CHUNK_BYTES].data)
        del tensor, flat
