"""Documents of the store as text, put together again over the contexts that they were cut at.

Only tokens are read, which a store has of all its contexts, so a document is whole also where its activations are not
asked for. Special tokens have no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.latents.vocabulary import Vocabulary
from shared.store import Store

Ints = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]
Span = tuple[int, int]
"""First character, and the one behind the last."""

REACH = 64  # contexts that a document is followed over, on each side


@dataclass(frozen=True)
class Document:
    """Text with the place of each token in it."""

    text: str
    """Bytes that are no text are one replacement character each."""
    tokens: Ints
    places: Ints
    """Of each token in the whole store: context * T + position."""
    starts: Ints
    """Where each token begins in the text, and where the last one ends: [tokens + 1]. A token that begins within a
    character begins where that does."""
    parts: dict[tuple[int, int], int] = field(default_factory=dict)
    """First token of its part in each context, by the context and the document's number within it."""


def documents(store: Store, contexts: Ints, vocabulary: Vocabulary) -> Iterator[Document]:
    """Every document that has a token in `contexts`, which are ascending neighbours."""
    is_split = goes_on(store)
    first, last = int(contexts[0]), int(contexts[-1])
    low = max(0, first - REACH) if is_split else first
    high = min(store.num_contexts, last + 1 + REACH) if is_split else last + 1
    rows = np.arange(low, high)
    tokens_BT, segments_BT = store.tokens(rows), store.segments(rows)
    T = store.seq_len
    flat, segment = tokens_BT.reshape(-1), segments_BT.reshape(-1)
    begins = np.diff(segment, prepend=segment[0] - 1) != 0
    begins[::T] = True
    if is_split:
        begins[T::T] = segment[T - 1 : -1 : T] < 0
    cuts = np.append(np.flatnonzero(begins), len(flat))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        is_wanted = stop > (first - low) * T and start < (last + 1 - low) * T
        if is_wanted and segment[start] >= 0:
            firsts = [start, *range((start // T + 1) * T, stop, T)]
            parts_of = {(low + first // T, int(segment[first])): first - start for first in firsts}
            whole = flat[start:stop].astype(np.int64)
            yield document(whole, np.arange(start, stop) + low * T, vocabulary, parts_of)


def goes_on(store: Store) -> bool:
    """Whether a document that fills a context to its end may go on in the next, in whatever way it was packed."""
    packing = store.plan.provenance.get("packing")
    return isinstance(packing, dict) and packing.get("long_documents") == "split"


def document(
    tokens: Ints, places: Ints, vocabulary: Vocabulary, parts_of: dict[tuple[int, int], int] | None = None
) -> Document:
    """One document of these tokens."""
    parts = [b"" if is_special(vocabulary, token) else vocabulary.bytes_of(token) for token in tokens.tolist()]
    data = b"".join(parts)
    text = data.decode("utf-8", errors="replace")
    ends = np.append(0, np.cumsum([len(part) for part in parts]))
    if len(text) == len(data):
        return Document(text, tokens, places, ends, parts_of or {})
    # Characters before each byte; a broken byte may be one replacement character of its own or share one.
    lengths = [len(letter.encode()) if letter != "\ufffd" else 1 for letter in text]
    if sum(lengths) != len(data):
        text = data.decode("latin-1")
        return Document(text, tokens, places, ends, parts_of or {})
    starts = np.searchsorted(np.cumsum(lengths), ends, side="right")
    return Document(text, tokens, places, starts, parts_of or {})


def is_special(vocabulary: Vocabulary, token: int) -> bool:
    """Whether a token has no text."""
    return not 0 <= token < len(vocabulary) or bool(vocabulary.special[token])


def touched(document: Document, spans: Sequence[Span]) -> Marks:
    """Tokens that share a character with one of the spans."""
    inside = np.zeros(len(document.text) + 1, np.int64)
    for start, stop in spans:
        inside[start] += 1
        inside[stop] -= 1
    before = np.append(0, np.cumsum(np.cumsum(inside)[:-1] > 0))  # marked characters before each character
    return before[document.starts[1:]] > before[document.starts[:-1]]
