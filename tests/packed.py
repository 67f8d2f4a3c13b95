"""Stores of documents of every length, packed by the harvest's own packer, and the truth about where each begins."""

from pathlib import Path

import numpy as np

from shared.lm.tokenizer import SpecialIds
from shared.store import Store
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode
from stage_harvest.tokens.packing import Packer
from tests.inspection import WIDTH
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
