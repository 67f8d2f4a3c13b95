"""What a corpus is: a description, a fingerprint that is cheap to take again, and an iterator of documents."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with ``role`` and ``content``, which become text by the tokenizer's chat template."""

    messages: list[dict[str, Any]]


Document = str | Chat | npt.NDArray[np.integer[Any]]
"""Text, chat messages, or token ids made elsewhere."""


class Corpus(ABC):
    """Where the tokens of a store come from: one source of documents, or several mixed."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for a store's metadata; the same wherever the files lie."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes with the documents; decides whether a store of this corpus can be continued.

        Raises GranaryError when the corpus is not there.
        """


class Source(Corpus):
    """One kind of documents in one place."""

    @abstractmethod
    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        """The documents; `order` shuffles the files they come from. Raises GranaryError on what can't be read."""


def as_document(value: Any, where: str) -> Document | None:
    """A field's value as a document, None for a null; raises GranaryError naming `where` for any other type."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value
    if isinstance(value, list):
        if value and all(isinstance(item, int) for item in value):
            return np.asarray(value, dtype=np.int64)
        if all(isinstance(item, dict) and "role" in item and "content" in item for item in value):
            return Chat(value)
    raise GranaryError(
        f"{where} holds {type(value).__name__}: it must be text, chat messages with role and content, or token ids"
    )
