"""The running interpreter's standard library (see `shared.bundled.stdlib`)."""

import hashlib
import random
from collections.abc import Iterator
from functools import cached_property

from shared.bundled import stdlib
from stage_harvest.corpus.base import CorpusSource, Document


class StandardLibrary(CorpusSource):
    """Python sources and the language reference's topics."""

    is_text = True

    def __init__(self, split: stdlib.Split, include_tests: bool) -> None:
        self.split: stdlib.Split = split
        self.include_tests = include_tests

    @cached_property
    def _documents(self) -> list[stdlib.Document]:
        # About 30 MB: kept, since it is hashed before it is read.
        return list(stdlib.documents(self.split, include_tests=self.include_tests))

    @property
    def description(self) -> str:
        return stdlib.description(self.split, include_tests=self.include_tests)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.description}\0{stdlib.content_hash(self._documents)}".encode()).hexdigest()

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        named = list(self._documents)
        if order is not None:
            order.shuffle(named)
        for name, text in named:
            yield Document(text, str(name))
