"""A run over a store with images of which no two are alike, so that both sides of explanations have some."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

import tests.pictured_store as store
from shared.store.format.layout import StorePlan
from tests.pictured_run import pictured_run

CONTEXTS = 48


def bytes_of(context: int) -> bytes:
    """A PNG of 30 x 20 pixels, of another colour in every context."""
    rows = (b"\0" + bytes([5 * context, 37 * context % 256, 250 - 5 * context]) * 30) * 20
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def distinct_run(folder: Path) -> Path:
    """Write ``store``, ``sae`` and ``latents`` as ``pictured_run`` does, and return the latents folder."""
    plan = store.pictured_plan

    def grown(*, assistant: bool = True) -> StorePlan:
        return replace(plan(assistant=assistant), num_contexts=CONTEXTS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "bytes_of", bytes_of)
        patch.setattr(store, "pictured_plan", grown)
        return pictured_run(folder, **{"latents.top": 30}) / "latents"
