"""Datasets of the Hugging Face hub, streamed: nothing is downloaded but what is read."""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus.base import Document, Source, as_document
from stage_harvest.corpus.files import UNREADABLE


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
        for record in self._records():
            if self.column not in record:
                raise GranaryError(f"{self.path} has no column {self.column!r}: there are {', '.join(record)}")
            document = as_document(record[self.column], f"{self.path}, column {self.column!r}")
            if document is not None:
                yield document

    def _records(self) -> Iterator[dict[str, Any]]:
        dataset = self._open()
        from datasets.exceptions import DatasetsError

        try:
            yield from dataset
        except (*UNREADABLE, ValueError, DatasetsError) as error:
            raise GranaryError(f"dataset {self.path} can't be read to its end: {first_line(error)}") from error

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise GranaryError("corpus=hub needs the datasets package: pip install 'granary-sae[hub]'") from error
        try:
            return datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except (*UNREADABLE, ValueError) as error:  # not found, gated, unreachable; unknown configuration or split
            raise GranaryError(f"dataset {self.path} can't be opened: {first_line(error)}") from error
