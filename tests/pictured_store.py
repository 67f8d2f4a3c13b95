"""A small store of made-up activations, kinds and images, for what reads them without a model."""

import struct
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np

from shared.store import Store
from shared.store.format.image_table import ASSISTANT, IMAGE, STRUCTURE, TEXT, ImageRow, Pictures
from shared.store.format.layout import StorePlan
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens


class Table:
    """One image of 2 x 3 cells in each context."""

    def __getitem__(self, contexts: slice) -> bytes:
        rows = [
            ImageRow(id=c, context=c, number=0, grid=0, sha256=digest_of(c), row=f"rows row {c + 1}", path=None,
                     width=30, height=20, rows=2, cols=3, x=0.0, y=0.0, dx=10.0, dy=10.0)
            for c in range(contexts.start, contexts.stop)
        ]  # fmt: skip
        return b"".join(row.to_line() for row in rows)


def bytes_of(context: int) -> bytes:
    """A PNG of 30 x 20 pixels, of one colour; every third context has the same."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress((b"\0" + bytes([80 * (context % 3), 120, 200]) * 30) * 20)),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def digest_of(context: int) -> str:
    return sha256(bytes_of(context)).hexdigest()


def pictured_plan(*, assistant: bool = True) -> StorePlan:
    provenance = {"model": {"id": "synthetic"}, "images": {"family": "none", "assistant": assistant}}
    return synthetic_plan(num_contexts=20, seq_len=32, d_model=12, dtype="float32", provenance=provenance)


def pictures_of(plan: StorePlan) -> Pictures:
    rng, shape = np.random.default_rng(3), (plan.num_contexts, plan.seq_len)
    kind = rng.choice([TEXT, TEXT | ASSISTANT, IMAGE, STRUCTURE], shape, p=[0.4, 0.2, 0.3, 0.1]).astype(np.uint8)
    is_image = kind == IMAGE
    image = np.where(is_image, np.arange(shape[0])[:, None], -1).astype(np.int32)
    cell = np.where(is_image[..., None], rng.integers(0, 2, (*shape, 2)), -1).astype(np.int16)
    files = {digest_of(context): bytes_of(context) for context in range(shape[0])}
    return Pictures(kind, image, cell, Table(), files.__getitem__)


def pictured_store(folder: Path, *, assistant: bool = True) -> Store:
    plan = pictured_plan(assistant=assistant)
    store = Store.create(folder, plan, *synthetic_tokens(plan), pictures=pictures_of(plan))
    for shard in store.pending():
        store.write_shard(shard, synthetic_shard(store, shard))
    store.finalize()
    return store
