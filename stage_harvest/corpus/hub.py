"""Datasets of the Hugging Face hub, streamed: nothing is downloaded but what is read."""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from shared.errors import GranaryError
from stage_harvest.corpus.base import Document, Source, as_document


class HubDataset(Source):
    """One column of one split; text, chat messages or token ids; nulls are left out.

    `order` can't shuffle files here: the order of documents is the dataset's, shuffled within the window alone.
    """

    def __init__(self, path: str, config: str | None, split: str, revision: str | None, column: str) -> None:
        self.path, self.config, self.split, self.revision, self.column = path, config, split, revision, column

    @property
    def description(self) -> str:
        subset = f"/{self.config}" if self.config else ""
        return f"hub: {self.path}{subset}, split {self.split}, column {self.column}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.description}\0{self.revision}".encode()).hexdigest()

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        dataset = self._open()
        for record in dataset:
            if self.column not in record:
                raise GranaryError(f"{self.path} has no column {self.column!r}: there are {', '.join(record)}")
            document = as_document(record[self.column], f"{self.path}, column {self.column!r}")
            if document is not None:
                yield document

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise GranaryError("corpus=hub needs the datasets package: pip install 'granary[hub]'") from error
        try:
            return datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except (OSError, ValueError) as error:  # not found, gated, unreachable; unknown configuration or split
            reason = str(error).splitlines()[0]
            raise GranaryError(f"dataset {self.path} can't be opened: {reason}") from error
