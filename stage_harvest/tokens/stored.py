"""The tokens of a store that exists: harvested again at other sites, or with another model (``corpus=store``).

Tokens, mask and segments are taken as they are, so no corpus is read and nothing is tokenised or packed. What they
decide (length and packing of the contexts, shards, what is held out) is the store's to say.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.lm import SpecialIds, load_tokenizer, tokenizer_hash
from shared.lm.recorded import without_next_token
from shared.store import Store
from shared.store.beside import sealed_tokens
from shared.store.format.layout import canonical_json
from stage_harvest.config import BosPlacement, HarvestSchema, LongDocuments, PackingMode, StoreCorpus
from stage_harvest.corpus import Corpus

log = logging.getLogger(__name__)

IN_PLACE = ("dtype", "codec", "chunk_tokens")


class StoredTokens(Corpus):
    """The contexts of a store, as they were packed."""

    def __init__(self, store: Store) -> None:
        """Raises GranaryError for a store that was extended (its shards follow no one plan), or is of no decoder."""
        if (model := without_next_token(store)) is not None:
            raise GranaryError(f"corpus.path={store.url} is a store of {model}, not of a decoder's tokens")
        if len(store.extents) > 1:
            raise GranaryError(f"corpus.path={store.url}: the store was extended, and its tokens follow no one plan")
        if store.plan.has_images:
            raise GranaryError(f"corpus.path={store.url}: its contexts hold images: harvest their corpus again")
        self.store = store
        tokenizer = store.plan.provenance.get("tokenizer") or {}
        try:
            recorded = {"bos": None, "eos": None, "pad": 0, "all": (), **(tokenizer.get("special_ids") or {})}
            self.special = SpecialIds(**{**recorded, "all": tuple(recorded["all"])})
            """Special tokens of the tokenizer that made the tokens."""
            self.tokenizer_hash = tokenizer.get("hash")
        except (TypeError, AttributeError) as error:
            raise GranaryError(f"{store.url} does not say which tokenizer made its tokens: {error}") from error

    @property
    def description(self) -> str:
        corpus = self.store.plan.provenance.get("corpus")
        told = corpus.get("description") if isinstance(corpus, dict) else None
        return f"the tokens of {self.store.url}" + (f" ({told})" if told else "")

    def fingerprint(self) -> str:
        """SHA-256 over the digests of tokens, mask and segments."""
        return hashlib.sha256(canonical_json(sealed_tokens(self.store))).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What decides the tokens, as the provenance of a store on them has it: what their own store says."""
        recorded = self.store.plan.provenance
        told: dict[str, Any] = {name: recorded[name] for name in ("tokenizer", "corpus", "packing") if name in recorded}
        return {**told, "tokens": self.fingerprint()}

    def arrays(self) -> "tuple[StoredRows, StoredRows, StoredRows]":
        """Tokens, mask and segments, each [S, T], read as they are sliced."""
        return tuple(StoredRows(self.store, name) for name in ("tokens", "mask", "segments"))  # type: ignore[return-value]

    def check_vocabulary(self, size: int, model: str) -> None:
        """Raise GranaryError where a token is none of a vocabulary of `size`."""
        for shard in range(self.store.num_shards):
            largest = int(self.store.tokens(self.store.shard_contexts(shard)).max())
            if largest >= size:
                raise GranaryError(
                    f"model {model} has a vocabulary of {size:,} tokens, but {self.store.url} holds token {largest:,}:"
                    " choose a model with the tokenizer that made it"
                )

    def compare_tokenizer(self, path: str, revision: str | None) -> None:
        """Say so where the model comes with another tokenizer than the one that made the tokens."""
        if self.tokenizer_hash is None:
            return
        try:
            own = tokenizer_hash(load_tokenizer(path, revision))
        except GranaryError:
            return
        if own != self.tokenizer_hash:
            log.warning(
                "model %s has another tokenizer than the one that made the tokens of %s: they must mean the same to it",
                path,
                self.store.url,
            )


class StoredRows:
    """Tokens, mask or segments of a store as an array [S, T] that can be sliced by contexts."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.shape = (store.num_contexts, store.seq_len)
        self.dtype = np.dtype(bool if name == "mask" else np.int32)

    def __getitem__(self, contexts: slice) -> npt.NDArray[Any]:
        read = getattr(self.store, self.name)(range(*contexts.indices(self.shape[0])))
        return np.asarray(read)


def is_same_place(path: str, url: str) -> bool:
    """Whether two URLs or paths are the same store."""
    if "://" in path or "://" in url:
        return path.rstrip("/") == url.rstrip("/")
    return os.path.realpath(path) == os.path.realpath(url)


def settings_of(cfg: HarvestSchema, store: Store) -> Iterator[tuple[str, Any]]:
    """Every key that the store decides in place of `cfg`, dotted, with its value."""
    plan, packing = store.plan, store.plan.provenance.get("packing") or {}
    yield "packing.seq_len", plan.seq_len
    yield "packing.mode", PackingMode(packing.get("mode", "isolated"))
    yield "packing.bos", BosPlacement(packing.get("bos", "none"))
    if "long_documents" in packing:
        yield "packing.long_documents", LongDocuments(packing["long_documents"])
    for name in ("drop_last", "mask_special"):
        if name in packing:
            yield f"packing.{name}", bool(packing[name])
    yield "packing.mask_first", int(packing.get("mask_first", 0))
    yield "store.shard_contexts", plan.shard_contexts
    yield "store.heldout_fraction", plan.heldout_fraction
    yield "store.heldout_placement", type(cfg.store.heldout_placement)(plan.heldout_placement)
    yield "corpus.contexts", plan.num_contexts
    yield "corpus.shuffle", False
    if is_same_place(cfg.corpus.path, cfg.store.url):  # type: ignore[attr-defined]
        for name in IN_PLACE:
            yield f"store.{name}", getattr(plan, name)
    batch = plan.provenance.get("batch_contexts")
    if cfg.batch_contexts is None and type(batch) is int and batch > 0:
        yield "batch_contexts", batch


def following(cfg: HarvestSchema, store: Store, given: list[str]) -> HarvestSchema:
    """`cfg` with what the store decides; raises GranaryError where one of the `given` keys says something else."""
    try:
        settings = dict(settings_of(cfg, store))
    except (ValueError, TypeError, AttributeError) as error:
        raise GranaryError(f"{store.url} does not say how its tokens were packed: {error}") from error
    groups: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, field = name.rpartition(".")
        asked = getattr(getattr(cfg, group) if group else cfg, field)
        is_given = name in given or (name == "packing.mode" and "packing" in given)
        if is_given and asked is not None and asked != value:
            told, wanted = (getattr(one, "value", one) for one in (value, asked))
            raise GranaryError(f"{name}={wanted}: with corpus=store it is as in {store.url}, {told}: leave it out")
        groups.setdefault(group, {})[field] = value
    own = groups.pop("", {})
    return replace(cfg, **own, **{group: replace(getattr(cfg, group), **values) for group, values in groups.items()})


def stored_tokens(cfg: HarvestSchema) -> StoredTokens | None:
    """What ``corpus=store`` names, None for every other corpus; raises GranaryError where there is no store."""
    return StoredTokens(Store.open(cfg.corpus.path)) if isinstance(cfg.corpus, StoreCorpus) else None
