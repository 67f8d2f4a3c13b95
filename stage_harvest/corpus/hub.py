"""Datasets of the Hugging Face hub, streamed: nothing is downloaded but what is read."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus.base import CorpusSource, Document
from stage_harvest.corpus.images import pictured
from stage_harvest.corpus.rows import as_content, field_value, without_nulls

# Files by which a folder is known as written by ``save_to_disk``.
SAVED = ("state.json", "dataset_dict.json")


class HubDataset(CorpusSource):
    """One column of one split; text, chat messages or token ids; nulls are left out. `images` is that of their images.

    `order` can't shuffle files here: the order of documents is the dataset's, shuffled within the window alone.
    """

    def __init__(
        self, path: str, config: str | None, split: str, revision: str | None, column: str, images: str | None = None
    ) -> None:
        self.path, self.config, self.split, self.revision, self.column = path, config, split, revision, column
        self.images, self.has_images = images, images is not None

    @property
    def description(self) -> str:
        subset = f"/{self.config}" if self.config else ""
        images = "" if self.images is None else f", images {self.images}"
        return f"hub: {self.path}{subset}, split {self.split}, column {self.column}{images}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.description}\0{self.revision}".encode()).hexdigest()

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for number, record in enumerate(self._records(), 1):
            where = f"{self.path} row {number}"
            for name in (self.column, self.images):
                if name is not None and name not in record and "." not in name:
                    raise GranaryError(f"{self.path} has no column {name!r}: there are {', '.join(record)}")
            value = field_value(record, self.column, where)
            # What datasets gives came through Arrow, which fills the keys that a record lacks with nulls.
            content = as_content(without_nulls(value), f"{where}, column {self.column!r}")
            if content is None:
                continue
            if self.images is not None:
                row = f"row {number}"
                content = pictured(content, field_value(record, self.images, where), self.images, where=where, row=row)
            yield Document(content, where)

    def _records(self) -> Iterator[dict[str, Any]]:
        dataset = self._open()
        try:
            yield from dataset if self.images is None else _encoded(dataset, self.images)
        except GranaryError:
            raise
        except Exception as error:  # of any of the libraries that datasets reads files with
            raise GranaryError(f"dataset {self.path} can't be read to its end: {_told(error)}") from error

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise GranaryError("corpus=hub needs the datasets package: pip install 'granary-sae[hub]'") from error
        try:
            if any((Path(self.path) / name).is_file() for name in SAVED):
                return self._saved(datasets.load_from_disk(self.path))
            return datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except GranaryError:
            raise
        except Exception as error:  # not found, gated, unreachable; unknown configuration or split; a package it lacks
            raise GranaryError(f"dataset {self.path} can't be opened: {_told(error)}") from error

    def _saved(self, saved: Any) -> Any:
        """The split of what ``save_to_disk`` wrote: a data set of several splits, or of one, which knows no name."""
        if not isinstance(saved, dict):
            return saved
        if self.split not in saved:
            raise GranaryError(f"dataset {self.path} has no split {self.split!r}: there are {', '.join(saved)}")
        return saved[self.split]


def _encoded(dataset: Any, column: str) -> Any:
    """The data set with the images of `column` as they are stored, which decoding would lose."""
    import datasets

    features = dataset.features
    if features is None or column not in features:  # JSON, whose values say themselves what they are
        return dataset
    feature = features[column]
    is_list = isinstance(feature, list | datasets.Sequence | datasets.List)
    item = feature[0] if isinstance(feature, list) else feature.feature if is_list else feature
    if not isinstance(item, datasets.Image):
        return dataset
    raw = datasets.Image(decode=False)
    return dataset.cast_column(column, datasets.List(raw) if is_list else raw)


def _told(error: Exception) -> str:
    """What `error` says in one line, with the remedy where a package is missing."""
    missing = "zstandard" in str(error) or isinstance(error, ImportError)
    return first_line(error) + (": pip install 'granary-sae[hub]'" if missing else "")
