"""What a corpus is: a description, a fingerprint that is cheap to take again, and an iterator of documents."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.images import EncodedImage


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with ``role`` and ``content``, which become text by the tokenizer's chat template."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Pictured:
    """Text or chat messages with the images that its placeholders stand for, in order; there may be none."""

    text: str | Chat
    images: tuple[EncodedImage, ...]
    row: str
    """File, below the folder of the corpus, and line or row: the same wherever the corpus lies."""


Content = str | Chat | npt.NDArray[np.integer[Any]] | Pictured
"""Text, chat messages, token ids made elsewhere, or rows of a corpus with images."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One document and where it came from."""

    content: Content
    where: str
    """File and line or row, for the line that refuses the document."""


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


class CorpusSource(Corpus):
    """One kind of documents in one place."""

    is_text: bool = False
    """Whether every document is text, so that there is no harvest without a tokenizer."""
    has_images: bool = False
    """Whether every document is `Pictured`."""

    @abstractmethod
    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        """The documents; `order` shuffles the files they come from. Raises GranaryError on what can't be read."""
