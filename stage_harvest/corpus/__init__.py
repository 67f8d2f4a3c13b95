"""Corpora: where documents come from. One file per kind; `open_corpus` is the way in."""

import random
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.basics.errors import GranaryError
from stage_harvest import config
from stage_harvest.corpus.base import Chat, Corpus, CorpusSource, Document, Pictured
from stage_harvest.corpus.hub import HubDataset
from stage_harvest.corpus.jsonl import JsonlFiles
from stage_harvest.corpus.mixture import Mixture, Part
from stage_harvest.corpus.parquet import ParquetFiles
from stage_harvest.corpus.shuffle import windowed_shuffle
from stage_harvest.corpus.stdlib import StandardLibrary
from stage_harvest.corpus.text import TextFiles
from stage_harvest.corpus.tokens import TokenFiles

__all__ = [
    "Chat",
    "Corpus",
    "CorpusSource",
    "Document",
    "Mixture",
    "Pictured",
    "in_order",
    "open_corpus",
    "read_documents",
]

T = TypeVar("T")


def open_corpus(cfg: config.CorpusSchema) -> Corpus:
    """The corpus that `cfg` describes; raises GranaryError when it, or a part of it, is not there."""
    if isinstance(cfg, config.MixtureCorpus):
        if not isinstance(cfg.parts, dict):
            raise GranaryError("corpus.parts must give each part a name, a kind and a weight: see docs/corpora.md")
        return Mixture({name: _open_part(name, fields, cfg) for name, fields in cfg.parts.items()})
    return _open_source(cfg)


def read_documents(source: CorpusSource, cfg: config.CorpusSchema, seed: int) -> Iterator[Document]:
    """The documents of `source` in the order that `cfg.shuffle` and `seed` give."""
    return in_order(source.documents, cfg, seed)


def in_order(read: Callable[[random.Random | None], Iterator[T]], cfg: config.CorpusSchema, seed: int) -> Iterator[T]:
    """What `read` gives, in the order that `cfg.shuffle` and `seed` give."""
    if not cfg.shuffle:
        return read(None)
    if cfg.shuffle_window < 1:
        raise GranaryError(f"corpus.shuffle_window={cfg.shuffle_window}: it must be at least 1")
    rng = random.Random(seed)
    return windowed_shuffle(read(rng), cfg.shuffle_window, rng)


def _open_source(cfg: config.CorpusSchema) -> CorpusSource:
    match cfg:
        case config.StdlibCorpus():
            return StandardLibrary(cfg.split.value, cfg.include_tests)
        case config.TextCorpus():
            return TextFiles(cfg.files, cfg.separator)
        case config.JsonlCorpus():
            return JsonlFiles(cfg.files, cfg.field, cfg.images)
        case config.ParquetCorpus():
            return ParquetFiles(cfg.files, cfg.column, cfg.images)
        case config.HubCorpus():
            return HubDataset(cfg.path, cfg.config, cfg.split, cfg.revision, cfg.column, cfg.images)
        case config.TokensCorpus():
            return TokenFiles(cfg.files, cfg.dtype, cfg.document_end)
        case _:
            raise TypeError(f"no corpus for {type(cfg).__name__}")


def _open_part(name: str, fields: Any, mixture: config.MixtureCorpus) -> Part:
    """A part from its keys: `kind`, `weight`, and those of ``conf/corpus/<kind>.yaml``, which gives the defaults."""
    where = f"corpus.parts.{name}"
    if not isinstance(fields, dict) or "kind" not in fields or "weight" not in fields:
        raise GranaryError(f"{where} needs a kind and a weight, besides the keys of its kind")
    own = {key: value for key, value in fields.items() if key not in ("kind", "weight")}
    if fields["kind"] not in config.SOURCE_KINDS:
        raise GranaryError(f"{where}.kind={fields['kind']}: choose from {', '.join(config.SOURCE_KINDS)}")
    # What is said of the mixture as a whole holds for its parts.
    whole = {"contexts": None, "shuffle": mixture.shuffle, "shuffle_window": mixture.shuffle_window}
    try:
        text = (resources.files("conf") / "corpus" / f"{fields['kind']}.yaml").read_text(encoding="utf-8")
        defaults = OmegaConf.create(text)
        assert isinstance(defaults, DictConfig)
        del defaults["defaults"]
        merged = OmegaConf.merge(OmegaConf.structured(config.SOURCE_KINDS[fields["kind"]]), defaults, whole, own)
        cfg = OmegaConf.to_object(merged)
        weight = float(fields["weight"])
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise GranaryError(f"{where}: {str(error).splitlines()[0]}") from error
    if not isinstance(cfg, config.CorpusSchema):
        raise TypeError(f"{type(cfg).__name__} is no corpus schema")
    source = _open_source(cfg)
    if source.has_images:
        raise GranaryError(f"{where}.images: a mixture takes no images: harvest that part into a store of its own")
    return Part(source, cfg, weight)
