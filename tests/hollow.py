"""Files as large as a real model's that take no room: whole headers, and nothing behind them."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path


def hollow_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32", width: int = 4) -> None:
    """A safetensors file of zeros, `width` bytes each, that the file system keeps as a hole."""
    header: dict[str, object] = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + width * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
