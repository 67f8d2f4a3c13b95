"""One pass over the store's contexts with the dictionary, counting every latent on every concept at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.vocabulary import Vocabulary
from shared.sae.for_store import DictionaryFolder, open_folder
from shared.store import Store
from stage_inspect.concepts.documents import documents
from stage_inspect.concepts.labels import Concepts
from stage_inspect.concepts.score import Match, Tally, rank
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.hashes import seeded
from stage_inspect.scan.pairs import Ints, Pairs, bins

GROUPS = 32  # of documents, for the intervals
TALLY_BYTES = 1 << 30
AT_ONCE = 64  # contexts whose documents are labelled together
GROUPING = 100  # purpose of the chance that puts documents into groups


@dataclass(frozen=True)
class Inspected:
    """A latents folder with the store and the dictionary that it was made of."""

    latents: Latents
    store: Store
    folder: DictionaryFolder
    vocabulary: Vocabulary

    @classmethod
    def open(cls, latents: Latents, sae: str | None, store: str | None) -> "Inspected":
        """Raises GranaryError where either is not there, or not the one that the folder was made of."""
        meta = latents.meta
        opened = Store.open(store or meta.store["url"])
        reads, writes = meta.dictionary["reads"], meta.dictionary["writes"]
        hook = reads[0] if reads == writes and len(reads) == 1 else None
        folder = open_folder(sae or str(meta.dictionary.get("path")), opened, hook)
        if folder.sha256() != meta.dictionary["sha256"]:
            raise GranaryError(f"{folder.path} is not the dictionary that {latents.url} was made of: give --sae")
        if opened.plan.hash() != meta.store.get("plan_hash"):
            raise GranaryError(f"{opened.url} is not the store that {latents.url} was made of: give --store")
        if latents.vocabulary is None:
            raise GranaryError(f"{latents.url} has no vocabulary: inspect again where the model's tokenizer is")
        return cls(latents, opened, folder, latents.vocabulary)


def search(
    inspected: Inspected, concepts: Concepts, contexts: Ints, count: int, tell: Callable[[int], None]
) -> dict[str, list[Match]]:
    """The best latents of each concept, over these contexts; raises GranaryError for a concept without an example."""
    store, meta, T = inspected.store, inspected.latents.meta, inspected.store.seq_len
    F, names = meta.num_latents, concepts.names
    groups = max(1, min(GROUPS, TALLY_BYTES // ((len(names) + 1) * F * 64 * 4)))
    tally = Tally.empty(len(names), groups, F)
    dictionary = inspected.folder.load(torch.device("cpu"))
    reader = BatchReader(store, dictionary, inspected.folder.sites, meta.window, store.isolated)
    for some in neighbours(contexts):
        first = int(some[0]) * T
        marks = np.zeros((len(names), len(some) * T), bool)
        group = np.zeros(len(some) * T, np.int64)
        for document in documents(store, some, inspected.vocabulary):
            inside = (document.places >= first) & (document.places < first + len(group))
            at = document.places[inside] - first
            marks[:, at] = concepts.mark(document)[:, inside]
            group[at] = int(seeded(meta.settings["seed"], GROUPING, document.places[:1])[0] % np.uint64(groups))
        for batch in reader.batches(some):
            places = batch.places.place_P - first
            trained = places[batch.at_N]
            tally.all_G += np.bincount(group[trained], minlength=groups)
            for concept in range(len(names)):
                tally.yes_CG[concept] += np.bincount(group[trained][marks[concept, trained]], minlength=groups)
            pairs = Pairs.of(batch.at_N, batch.indices_NK, batch.values_NK, F)
            where = places[pairs.at]
            tally.add(pairs.latent, bins(pairs.value, meta.histogram_origin), group[where], marks[:, where])
            tell(len(places))
    absent = [name for name, examples in zip(names, tally.yes_CG.sum(1), strict=True) if not examples]
    if len(absent) == len(names):
        raise GranaryError(f"no token of these contexts is an example of {', '.join(absent)}")
    return {name: rank(tally, number, count) for number, name in enumerate(names) if name not in absent}


def neighbours(contexts: Ints) -> list[Ints]:
    """Contexts in runs of neighbours, `AT_ONCE` at most."""
    runs = np.split(contexts, np.flatnonzero(np.diff(contexts) != 1) + 1)
    return [run[start : start + AT_ONCE] for run in runs for start in range(0, len(run), AT_ONCE)]
