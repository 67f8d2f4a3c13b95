"""No document is on both sides, however often it was cut, in stores packed by the harvest's own packer."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from shared.latents.folder import Latents
from shared.lm.tokenizer import SpecialIds
from shared.store import Store
from shared.text import beginnings
from shared.text.beginnings import Beginnings
from shared.text.documents import documents
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode
from stage_harvest.tokens.packing import Packer
from stage_inspect.explain.examples import choose
from stage_inspect.explain.sides import Sides
from stage_inspect.inspect import inspect
from tests.inspection import WIDTH, inspect_config, small_sae
from tests.latents import synthetic_vocabulary
from tests.synthetic import synthetic_plan, synthetic_shard

T = 16
OF_ONE = 1000  # ids of one document: a token tells which it is of
SPECIAL = SpecialIds(bos=1, eos=2, pad=0, all=(0, 1, 2))


def packed_store(folder: Path, mode: PackingMode, long_documents: LongDocuments, bos: BosPlacement) -> Store:
    """Documents within a context, over a few, over a hundred, and some that end exactly where a context does."""
    lengths = [*np.random.default_rng(0).integers(2, 40, 40).tolist(), 100 * T, T, 2 * T, 5, 3 * T - 5, 7, 70 * T, 9, 9]
    documents = [OF_ONE * (number + 1) + np.arange(n, dtype=np.int32) % OF_ONE for number, n in enumerate(lengths)]
    packer = Packer(
        mode=mode, seq_len=T, special=SPECIAL, bos=bos, long_documents=long_documents, drop_last=False,
        mask_special=True, mask_first=0,
    )  # fmt: skip
    contexts = list(packer.pack(documents))
    packing = {"mode": mode.value, "long_documents": long_documents.value}
    plan = synthetic_plan(
        len(contexts), T, WIDTH, shard_contexts=20, provenance={"model": {"id": "synthetic"}, "packing": packing}
    )
    store = Store.create(folder, plan, *(np.stack(of) for of in zip(*contexts, strict=True)))
    for shard in store.pending():
        store.write_shard(shard, synthetic_shard(store, shard))
    store.finalize()
    return store


def scanned(store: Store) -> dict[tuple[int, int], int]:
    """Where each part's document begins, by one walk over all tokens of the store."""
    segments = store.segments(range(store.num_contexts))
    is_split = store.plan.provenance["packing"]["long_documents"] == "split"
    found, before, begun = {}, -1, 0
    for context, position in np.ndindex(*segments.shape):
        own = int(segments[context, position])
        goes_on = is_split and before >= 0 if position == 0 else own == before
        if not goes_on:
            begun = context * T + position
        if own >= 0:
            assert found.setdefault((context, own), begun) == begun
        before = own
    return found


def document_of(tokens: np.ndarray) -> set[int]:
    return set((tokens[tokens >= OF_ONE] // OF_ONE).tolist())


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize(
    ("mode", "long_documents", "bos"),
    [
        ("isolated", "split", "none"), ("isolated", "split", "document"), ("joined", "split", "context"),
        ("separate", "split", "context"), ("separate", "truncate", "none"), ("isolated", "truncate", "context"),
    ],
)  # fmt: skip
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
def test_no_document_on_both_sides(tmp_path: Path, mode: str) -> None:
    store = packed_store(tmp_path / "store", PackingMode(mode), LongDocuments.split, BosPlacement.none)
    small_sae(tmp_path / "sae")
    changes = {"store.url": store.url, "latents.top": 60, "latents.sample": 120, "latents.pool": 120}
    inspect(inspect_config(tmp_path, **changes))
    latents = Latents.open(tmp_path / "latents")
    of_long = [set(), set()]
    for seed, number in itertools.product(range(4), (0, 1, 2)):
        chosen = choose(latents, number, Sides(store, seed), 60, 60)
        train = [document_of(one.tokens) for one in chosen.train + chosen.train_silent]
        tested = [document_of(one.example.tokens) for one in chosen.tested]
        assert min(len(train), len(tested)) > 4
        assert {len(one) for one in train + tested} == {1}
        assert not set.union(*train) & set.union(*tested)
        for side, of_side in zip(of_long, (train, tested), strict=True):
            side.add(sum({41} == one for one in of_side) > 1)
    assert of_long == [{False, True}, {False, True}]  # many parts of the long one, all on one side


@pytest.mark.parametrize("mode", ["isolated", "separate"])
def test_documents_are_put_together_as_they_are_dealt_out(tmp_path: Path, mode: str) -> None:
    """Concepts and rules read whole texts: those of the same parts, also where each context holds one document."""
    store = packed_store(tmp_path, PackingMode(mode), LongDocuments.split, BosPlacement.none)
    truth = scanned(store)
    whole = list(documents(store, np.arange(40), synthetic_vocabulary()))
    assert max(len(one.tokens) for one in whole) > T
    for one in whole:
        assert {truth[part] for part in one.parts} == {int(one.places[0])}
