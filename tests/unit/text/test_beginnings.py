"""Where documents begin, in stores packed by the harvest's own packer, against one walk over all tokens."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from shared.text import beginnings
from shared.text.beginnings import HEAD, Beginnings
from shared.text.documents import REACH, documents
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode
from tests.latents import synthetic_vocabulary
from tests.packed import T, document_of, packed_store, scanned
from tests.spanning import spanning

MODES = [
    ("isolated", "split", "none"), ("isolated", "split", "document"), ("joined", "split", "context"),
    ("separate", "split", "context"), ("separate", "truncate", "none"), ("isolated", "truncate", "context"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "long_documents", "bos", "rows"), spanning(MODES, [3, 64]))
def test_beginnings_equal_a_walk_over_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, long_documents: str, bos: str, rows: int
) -> None:
    monkeypatch.setattr(beginnings, "ROWS", rows)
    store = packed_store(tmp_path, PackingMode(mode), LongDocuments(long_documents), BosPlacement(bos))
    truth = scanned(store)
    parts = [list(truth)[number] for number in np.random.default_rng(1).permutation(len(truth))]
    found = Beginnings(store)
    assert {part: found.place(*part) for part in parts} == truth
    # All parts of one document begin at one place, whatever may have been taken for a part of it.
    places: dict[int, set[int]] = {}
    tokens, segments = store.tokens(range(store.num_contexts)), store.segments(range(store.num_contexts))
    for context, own in truth:
        for document in document_of(tokens[context][segments[context] == own]):
            places.setdefault(document, set()).add(truth[context, own])
    assert {len(of) for of in places.values()} == {1}
    if long_documents == "split":
        assert len({context for (context, _), place in truth.items() if place == max(places[41])}) >= 100


@pytest.mark.parametrize("mode", ["isolated", "separate"])
def test_documents_are_put_together_as_they_are_dealt_out(tmp_path: Path, mode: str) -> None:
    """Concepts and rules read whole texts: those of the same parts, also where each context holds one document."""
    store = packed_store(tmp_path, PackingMode(mode), LongDocuments.split, BosPlacement.none)
    truth = scanned(store)
    whole = list(documents(store, np.arange(40), synthetic_vocabulary()))
    assert max(len(one.tokens) for one in whole) > T
    for one in whole:
        assert {truth[part] for part in one.parts} == {int(one.places[0])}


@pytest.mark.parametrize("mode", ["isolated", pytest.param("joined", marks=pytest.mark.slow)])
def test_a_document_is_known_by_its_first_tokens_from_wherever_it_is_seen(tmp_path: Path, mode: str) -> None:
    """Also from the last of a hundred contexts, further than documents are put together."""
    store = packed_store(tmp_path, PackingMode(mode), LongDocuments.split, BosPlacement.none)
    known, truth, tokens = Beginnings(store), scanned(store), store.tokens(range(store.num_contexts)).reshape(-1)
    heads: dict[int, set[bytes]] = {}
    out_of_sight = 0
    for context in range(store.num_contexts):
        for one in documents(store, np.array([context]), synthetic_vocabulary()):
            begins = truth[next(iter(one.parts))]
            heads.setdefault(begins, set()).add(known.head(one))
            if begins < one.places[0]:
                out_of_sight += 1
                first = tokens[begins : begins + HEAD].astype("<i8")
                assert heads[begins] == {hashlib.sha256(first.tobytes()).digest()}
    assert out_of_sight > 100 - REACH
    assert {len(of) for of in heads.values()} == {1}
    assert len(set.union(*heads.values())) == len(heads)
