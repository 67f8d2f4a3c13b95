"""What an inspection will do: resolved from the configuration, checked, and shown before anything long begins."""

import hashlib
import logging
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.basics.images import pillow
from shared.basics.versions import software_versions
from shared.latents.layout import BINS, BINS_PER_OCTAVE
from shared.lm.recorded import ModelChoice, choose_model, without_next_token
from shared.sae.for_store import DictionaryFolder, open_folder
from shared.sae.latents import SparseLatents
from shared.sae.variants import Dictionary
from shared.store import Store
from shared.store.beside import open_beside
from shared.store.choose import choose_contexts
from shared.store.format.layout import canonical_json
from stage_inspect.config import InspectSchema
from stage_inspect.scan.batches import given
from stage_inspect.scan.settings import Settings

log = logging.getLogger(__name__)

PART_TOKENS = 1 << 18  # of a part, which is what a killed process loses at most
MOST_PARTS = 512
PROBE_TOKENS = 64
# Octaves of the histogram above the largest activation of the probe; 17 are below it.
HEADROOM = 4
PICTURES = 1  # of the form in which they are kept


@dataclass(frozen=True)
class InspectJob:
    """Store, dictionary, contexts and settings of one latents folder."""

    cfg: InspectSchema
    store: Store
    folder: DictionaryFolder
    contexts: npt.NDArray[np.int64]
    model: ModelChoice | None
    """The language model whose head the logit weights need; None where they are not wanted."""

    @classmethod
    def from_config(cls, cfg: InspectSchema) -> "InspectJob":
        """Raises GranaryError for the first input that is wrong; reads no activation."""
        check_settings(cfg)
        store = open_beside(cfg.store.url, named_urls(cfg.store.beside))
        folder = open_folder(cfg.sae.path, store, cfg.hook)
        if not folder.config.writes_rows:
            raise GranaryError(
                f"{cfg.sae.path} is a {folder.config.kind}, whose latents are maps of what they read: only "
                "dictionaries whose latents write a row can be inspected"
            )
        if store.plan.has_images:
            pillow()  # its images are made small at the end
        contexts = choose_contexts(store, cfg.split, cfg.contexts)
        if cfg.logits and (model := without_next_token(store)) is not None:
            log.info("%-9s no logits: the store is of %s", "note", model)
            cfg = replace(cfg, logits=False)
        return cls(cfg, store, folder, contexts, choose_model(cfg.model, store) if cfg.logits else None)

    @property
    def num_latents(self) -> int:
        """F."""
        return self.folder.config.d_latent

    @cached_property
    def shards(self) -> list[int]:
        """Shards that hold the contexts, ascending."""
        return sorted({self.store.shard_of(int(context)) for context in self.contexts})

    @cached_property
    def trainable(self) -> npt.NDArray[np.int64]:
        """Trainable tokens of each context."""
        per_context = {
            record.first_context + number: trainable
            for record in self.store.committed().values()
            for number, trainable in enumerate(record.trainable)
        }
        return np.array([per_context[int(context)] for context in self.contexts], np.int64)

    @cached_property
    def parts(self) -> list[npt.NDArray[np.int64]]:
        """Contexts of each part: whole shards, as many as make `PART_TOKENS`. Who does which part changes nothing."""
        seq_len = self.store.seq_len
        size = max(PART_TOKENS, math.ceil(len(self.contexts) * seq_len / MOST_PARTS))
        shard = self.contexts // self.store.plan.shard_contexts
        found: list[list[npt.NDArray[np.int64]]] = []
        tokens = size
        for one in np.split(self.contexts, np.flatnonzero(np.diff(shard)) + 1):
            if tokens >= size:
                found.append([])
                tokens = 0
            found[-1].append(one)
            tokens += len(one) * seq_len
        return [np.concatenate(part) for part in found]

    def settings(self, dictionary: Dictionary) -> Settings:
        """All of them; the histogram's origin comes from the first activations."""
        chosen = self.cfg.latents
        return Settings(
            window=chosen.window,
            top=chosen.top,
            sample=chosen.sample,
            token_sample=chosen.token_sample,
            together_tokens=chosen.together_tokens,
            pool=chosen.pool,
            seed=self.cfg.seed,
            origin=self.probe(dictionary),
        )

    def probe(self, dictionary: Dictionary) -> int:
        """log2 of where the histogram begins, from the largest activation of the first tokens."""
        values = self.first_latents(dictionary).values
        largest = float(values.max()) if values.numel() else 0.0
        octaves = math.ceil(math.log2(largest)) if largest > 0 else 0
        return octaves + HEADROOM - BINS // BINS_PER_OCTAVE

    def first_latents(self, dictionary: Dictionary) -> SparseLatents:
        """Those of the first trainable tokens. Raises GranaryError where there are none."""
        store, sites = self.store, self.folder.sites
        for context in self.contexts:
            mask_1T = np.array(store.mask([context]))
            mask_1T[0, np.flatnonzero(mask_1T[0])[PROBE_TOKENS:]] = False
            if mask_1T.any():
                read = {site: store.read_context(site, int(context)) for site in sites.reads}
                x: Any = given([read], sites, mask_1T, store.segments([context]), isolated=store.isolated)
                return dictionary.encode(x.to(dictionary.b_dec.device))
        raise GranaryError(f"no trainable position in the contexts of {self.store.url}: nothing to inspect")

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The dictionary and the part of the store that is read, as ``meta.json`` has them."""
        folder, config = self.folder, self.folder.config
        return {
            "dictionary": {
                "path": folder.path,
                "sha256": folder.sha256(),
                "kind": config.kind,
                "activation": config.activation,
                "reads": list(folder.sites.reads),
                "writes": list(folder.sites.writes),
                "normalisation": config.normalisation,
            },
            "store": {
                "url": self.store.url,
                "digest": self.store.digest(self.shards),
                "plan_hash": self.store.plan.hash(),
                "split": self.cfg.split.value,
                "shards": len(self.shards),
            },
        }

    def identity(self, settings: Settings) -> str:
        """SHA-256 of all that decides the content, wherever store and dictionary lie."""
        record = {
            "dictionary": self.sources["dictionary"] | {"path": None},
            "store": self.sources["store"] | {"url": None},
            "contexts": hashlib.sha256(self.contexts.tobytes()).hexdigest(),
            "settings": settings.to_json(),
            "logits": self.cfg.logits,
        }
        if self.store.plan.has_images:
            record["pictures"] = PICTURES
        return hashlib.sha256(canonical_json(record)).hexdigest()

    def versions(self) -> dict[str, str]:
        """Software that made it."""
        return software_versions("torch", "numpy")


def check_settings(cfg: InspectSchema) -> None:
    """Raise GranaryError for a number that can't be."""
    chosen = cfg.latents
    if not 8 <= chosen.window <= 128:
        raise GranaryError(f"latents.window={chosen.window}: choose from 8 to 128 tokens")
    bounds = {"top": (1, 1000), "sample": (1, 10_000), "token_sample": (1, 10_000), "pool": (0, 65_536)}
    for name, (least, most) in bounds.items():
        value = getattr(chosen, name)
        if not least <= value <= most:
            raise GranaryError(f"latents.{name}={value}: choose from {least} to {most}")
    if chosen.together_tokens < 0:
        raise GranaryError(f"latents.together_tokens={chosen.together_tokens}: it must be at least 0")
