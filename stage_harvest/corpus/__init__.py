"""Corpora: where documents come from. One file per kind; `open_corpus` is the way in."""

import random
from collections.abc import Iterator

from shared.errors import GranaryError
from stage_harvest import config
from stage_harvest.corpus.base import Chat, Corpus, Document
from stage_harvest.corpus.hub import HubDataset
from stage_harvest.corpus.jsonl import JsonlFiles
from stage_harvest.corpus.parquet import ParquetFiles
from stage_harvest.corpus.shuffle import windowed_shuffle
from stage_harvest.corpus.stdlib import StandardLibrary
from stage_harvest.corpus.text import TextFiles
from stage_harvest.corpus.tokens import TokenFiles

__all__ = ["Chat", "Corpus", "Document", "open_corpus", "read_documents"]


def open_corpus(cfg: config.CorpusSchema) -> Corpus:
    """The corpus that `cfg` describes; raises GranaryError when it is not there."""
    match cfg:
        case config.StdlibCorpus():
            return StandardLibrary(cfg.split.value, cfg.include_tests)
        case config.TextCorpus():
            return TextFiles(cfg.files, cfg.separator)
        case config.JsonlCorpus():
            return JsonlFiles(cfg.files, cfg.field)
        case config.ParquetCorpus():
            return ParquetFiles(cfg.files, cfg.column)
        case config.HubCorpus():
            return HubDataset(cfg.path, cfg.config, cfg.split, cfg.revision, cfg.column)
        case config.TokensCorpus():
            return TokenFiles(cfg.files, cfg.dtype, cfg.document_end)
        case _:
            raise TypeError(f"no corpus for {type(cfg).__name__}")


def read_documents(corpus: Corpus, cfg: config.CorpusSchema, seed: int) -> Iterator[Document]:
    """The documents of `corpus` in the order that `cfg.shuffle` and `seed` give."""
    if not cfg.shuffle:
        return corpus.documents()
    if cfg.shuffle_window < 1:
        raise GranaryError(f"corpus.shuffle_window={cfg.shuffle_window}: it must be at least 1")
    rng = random.Random(seed)
    return windowed_shuffle(corpus.documents(rng), cfg.shuffle_window, rng)
