"""A latents folder in a bucket: what a page of one latent reads of it, and its notes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.latents import Latents
from shared.latents.layout import NOTES
from shared.store.io.open import open_io
from stage_inspect.explorer.documents import Documents
from tests.latents import synthetic_latents

pytestmark = [
    pytest.mark.s3,
    pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning"),
]
LATENTS = 8192


class Counted:
    """A folder's io that counts the bytes and requests of its readers, by key."""

    def __init__(self, latents: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        read_into, get = latents.io.read_into, latents.io.get

        def counted_read(key: str, offset: int, buffers: Sequence[memoryview]) -> None:
            self.count(key, sum(len(buffer) for buffer in buffers))
            read_into(key, offset, buffers)

        def counted_get(key: str) -> bytes:
            found = get(key)
            self.count(key, len(found))
            return found

        monkeypatch.setattr(latents.io, "read_into", counted_read)
        monkeypatch.setattr(latents.io, "get", counted_get)

    def count(self, key: str, num_bytes: int) -> None:
        self.bytes[key] += num_bytes
        self.requests[key] += 1


def test_a_page_reads_ranges_and_the_notes_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = synthetic_latents(tmp_path / "latents", LATENTS, top=40, sample=60, num_windows=16_384, window=64)
    here.notes.add_explanation(7, "opens a bracket", method="person", author="me")
    io, size = open_io(url), 0
    for path in sorted(Path(here.url).rglob("*")):
        if path.is_file():
            io.put(str(path.relative_to(here.url)), [path.read_bytes()])
            size += path.stat().st_size
    there = Latents.open(url)
    counted = Counted(there, monkeypatch)

    assert there.latent(7).numbers == here.latent(7).numbers
    assert [one.marked for one in there.top(7)] == [one.marked for one in here.top(7)]
    assert [one.marked for one in there.silent(7)] == [one.marked for one in here.silent(7)]
    assert there.neighbours(7) == here.neighbours(7)
    read = sum(counted.bytes.values()) - counted.bytes[NOTES]
    assert read < size / 5, counted.bytes.most_common(5)
    # What is near in the folder comes with what was read.
    counted.bytes.clear()
    there.latent(8), there.top(8)
    assert sum(counted.bytes.values()) < size / 20, counted.bytes.most_common(5)

    assert [one.text for one in there.latent(7).explanations] == ["opens a bracket"]
    assert [found.latent for found in there.search("bracket")] == [7]
    assert counted.requests[NOTES] == 1
    with pytest.raises(GranaryError, match="copy the latents folder"):
        there.notes.set_note(7, "x")

    pages, same = Documents(there, "a run"), Documents(here, "a run")
    assert pages.latent(7) == same.latent(7)
    assert np.array_equal(there.table["density"], here.table["density"])
