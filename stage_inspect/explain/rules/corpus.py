"""The tokens that rules are found on and scored on, and where each latent fires, from one pass over the store.

A document is in one of two halves by a hash of its first tokens (`Beginnings.head`), so that one that reaches over many
contexts, or stands in the corpus twice, is in one half alone. N tokens of a half, J labels, P pairs of a token and a
latent firing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from shared.basics.errors import GranaryError
from shared.text.beginnings import Beginnings
from shared.text.documents import documents
from shared.text.python import looks_like_python
from stage_inspect.concepts.search import Inspected
from stage_inspect.explain.rules.grammar import Channel
from stage_inspect.explain.rules.labels import Labels
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.pairs import Floats, Ints, Pairs

RUN = 8  # neighbouring contexts that are read together
MOST_PAIRS = 1 << 26


@dataclass(frozen=True)
class Half:
    """Trainable tokens of the documents of one half."""

    channels: dict[Channel, Ints]
    """Ids [N] of the token, and of the one before and behind it in its document's part; -1 where there is none."""
    labels_NJ: npt.NDArray[np.uint8]
    document: Ints
    """Number of the document [N], from 0 in the order of the store."""
    place: Ints
    """Position in the store [N]: context * T + position."""
    at: Ints
    """Of each pair [P], ascending within a latent, which of the N tokens it is."""
    value: Floats
    offsets: Ints
    """Where each latent's pairs begin: [F + 1]."""
    heads: tuple[bytes, ...]
    """What the half of each document follows from."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.place)

    def firing(self, latent: int) -> tuple[Ints, Floats]:
        """The tokens on which a latent fires, and how strongly."""
        span = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        return self.at[span], self.value[span]


@dataclass(frozen=True)
class Corpus:
    """Both halves, and what their labels mean."""

    train: Half
    heldout: Half
    labels: Labels


def choose_runs(contexts: Ints, seq_len: int, tokens: int) -> list[Ints]:
    """Runs of neighbours at even distances that hold about so many tokens; all where there are no more."""
    cuts = np.flatnonzero(np.diff(contexts) != 1) + 1
    runs = [run[start : start + RUN] for run in np.split(contexts, cuts) for start in range(0, len(run), RUN)]
    wanted = max(1, min(len(runs), round(tokens / (RUN * seq_len))))
    return [runs[number * len(runs) // wanted] for number in range(wanted)]


def most_tokens(inspected: Inspected) -> int:
    """So many that their pairs fit in memory."""
    table = inspected.latents.table
    per_token = float(table["fired"].sum()) / max(1, inspected.latents.meta.counts["tokens"])
    return int(MOST_PAIRS / max(1.0, per_token))


def read(inspected: Inspected, runs: list[Ints], *, python: bool | None, tell: Callable[[int], None]) -> Corpus:
    """Both halves of these contexts; `python`: whether the text is Python, None to look.

    Raises GranaryError where one of the halves has no document.
    """
    if python is None:
        python = looks_like_python(inspected.store, runs, inspected.vocabulary)
    labels = Labels(inspected.vocabulary, with_python=python)
    parts = list(_parts(inspected, runs, labels, tell))
    F = inspected.latents.meta.num_latents
    heads: dict[bytes, None] = dict.fromkeys(head for part in parts for head in part.heads)
    train, heldout = (_joined(parts, F, [head for head in heads if side_of(head) == side]) for side in (0, 1))
    if not train.num_tokens or not heldout.num_tokens:
        raise GranaryError(
            f"rules are found on one half of the documents and scored on the other: {len(heads)} documents of"
            f" {inspected.store.url} are too few: give --tokens more, or --split all"
        )
    return Corpus(train, heldout, labels)


def side_of(head: bytes) -> int:
    """0: rules are found on this document; 1: they are scored on it."""
    return head[0] & 1


@dataclass(frozen=True)
class _Part:
    """Tokens of one batch."""

    channels: dict[Channel, Ints]
    labels_NJ: npt.NDArray[np.uint8]
    head_N: Ints
    """Which of `heads` each token's document is."""
    place: Ints
    pairs: Pairs
    """``at`` counts tokens of the part."""
    heads: list[bytes]


def _parts(inspected: Inspected, runs: list[Ints], labels: Labels, tell: Callable[[int], None]) -> Iterator[_Part]:
    store, meta = inspected.store, inspected.latents.meta
    dictionary = inspected.folder.load(torch.device("cpu"))
    reader = BatchReader(store, dictionary, inspected.folder.sites, meta.window, store.isolated)
    beginnings = Beginnings(store)
    T = store.seq_len
    for run in runs:
        first, size = int(run[0]) * T, len(run) * T
        of_text = np.zeros((labels.of_text, size), bool)
        head_P = np.full(size, -1)
        heads: list[bytes] = []
        for document in documents(store, run, inspected.vocabulary):
            here = (document.places >= first) & (document.places < first + size)
            at = document.places[here] - first
            of_text[:, at] = labels.of_document(document)[:, here]
            head_P[at] = len(heads)
            heads.append(beginnings.head(document))
        for batch in reader.batches(run):
            places, at_N = batch.places, batch.at_N
            before = np.where(at_N > places.document_P[at_N], places.tokens_P[np.maximum(at_N - 1, 0)], -1)
            token, before, following = (
                np.where(ids < len(inspected.vocabulary), ids, -1)
                for ids in (places.tokens_P[at_N], before, places.next_P[at_N])
            )
            where = places.place_P[at_N] - first
            rows = [labels.of_tokens(token, before, following), of_text[:, where]]
            rows.append(labels.of_positions(places.number_P[at_N]))
            pairs = Pairs.of(np.arange(len(at_N)), batch.indices_NK, batch.values_NK, meta.num_latents)
            fires = pairs.value > 0
            yield _Part(
                {"token": token, "previous": before, "next": following},
                np.ascontiguousarray(np.concatenate(rows).T).view(np.uint8),
                head_P[where],
                places.place_P[at_N],
                Pairs(pairs.latent[fires], pairs.at[fires], pairs.value[fires]),
                heads,
            )
            tell(len(places.place_P))


def _joined(parts: list[_Part], num_latents: int, heads: list[bytes]) -> Half:
    """The tokens of one half, and their pairs by latent."""
    number = {head: index for index, head in enumerate(heads)}
    kept, pairs, documents_N, base = [], [], [], 0
    for part in parts:
        of_head = np.array([number.get(head, -1) for head in part.heads] + [-1])[part.head_N]
        inside = of_head >= 0
        place = np.cumsum(inside) - 1 + base
        fires = inside[part.pairs.at]
        pairs.append((part.pairs.latent[fires].astype(np.int32), place[part.pairs.at[fires]].astype(np.int32),
                      part.pairs.value[fires]))  # fmt: skip
        channels = {name: ids[inside] for name, ids in part.channels.items()}
        kept.append(replace(part, channels=channels, labels_NJ=part.labels_NJ[inside], place=part.place[inside]))
        documents_N.append(of_head[inside])
        base += int(inside.sum())
    latent, at, value = (np.concatenate(column) for column in zip(*pairs, strict=True))
    order = np.argsort(latent, kind="stable")
    return Half(
        {name: np.concatenate([part.channels[name] for part in kept]) for name in kept[0].channels},
        np.concatenate([part.labels_NJ for part in kept]),
        np.concatenate(documents_N),
        np.concatenate([part.place for part in kept]),
        at[order],
        value[order],
        np.append(0, np.cumsum(np.bincount(latent, minlength=num_latents))),
        tuple(heads),
    )
