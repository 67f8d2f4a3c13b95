"""A small corpus of rows with images: two, one, none, the same image twice, and one in what the assistant says."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHAPES = [(50, 30), (30, 50), (37, 37), (90, 20), (64, 61), (1, 1)]
IMAGE = {"type": "image"}
ANSWERS = [["It is a cat, é 猫 here."], ["No image."], ["first", "second one"], ["see for yourself"], ["tiny"]]


def picture(number: int) -> bytes:
    width, height = SHAPES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def rows() -> list[tuple[list[Any], list[int]]]:
    """Messages, and which of the pictures their placeholders are."""
    return [
        ([user(IMAGE, said("what is it?")), assistant(said(ANSWERS[0][0]))], [0]),
        ([user(said("and here?")), assistant(said(ANSWERS[1][0]))], []),
        ([user(IMAGE, said(" or "), IMAGE), assistant(said(ANSWERS[2][0])),
          user(IMAGE), assistant(said(ANSWERS[2][1]))], [1, 2, 1]),
        ([user(said("draw")), assistant(IMAGE, said(ANSWERS[3][0]))], [3]),
        ([user(said("tiny: "), IMAGE), assistant(said(ANSWERS[4][0]))], [5]),
        ([user(IMAGE, said("?")), assistant(said("x"))], [4]),
    ]  # fmt: skip


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def write(file: Path, times: int = 1) -> Path:
    """The rows as Hugging Face writes them."""
    messages, numbers = zip(*rows() * times, strict=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [[{"bytes": picture(n), "path": f"{n}.png"} for n in one] for one in numbers]
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    table = pa.table({"messages": pa.array(messages, pa.list_(message)), "images": pa.array(images, pa.list_(image))})
    pq.write_table(table, file, row_group_size=2)
    return file
