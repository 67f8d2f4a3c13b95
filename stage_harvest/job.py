"""What a harvest will write: resolved from the configuration, checked, and shown before anything long begins."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.basics.units import parse_bytes
from shared.basics.versions import software_versions
from shared.launch.given import given_keys
from shared.lm import (
    ModelIdentity,
    SpecialIds,
    check_hooks,
    check_tensor_parallel,
    load_tokenizer,
    load_trunk_config,
    model_identity,
    needed_depth,
    quantisation_config,
    resolve_model,
    special_ids,
    tokenizer_hash,
)
from shared.lm.hookpoint import HookPoint, hook_points
from shared.lm.module_sites import ModuleSite, module_sites
from shared.lm.modulepoint import Point
from shared.lm.places import deepstack_layers
from shared.lm.vision.reader import VisionReader
from shared.store import StorePlan
from shared.store.adding import place_of_addition
from shared.store.format import layout
from shared.store.format.dtypes import storage_type
from shared.store.io.base import ObjectIO
from stage_harvest.config import BatchesCorpus, BosPlacement, HarvestSchema, HooksSchema, PackingMode
from stage_harvest.corpus import Corpus, CorpusSource, Mixture, open_corpus
from stage_harvest.shards.forward import default_batch_contexts
from stage_harvest.tokens.encoder import TextEncoder
from stage_harvest.tokens.packing import Packer
from stage_harvest.tokens.pictured import PicturedTokeniser
from stage_harvest.tokens.stored import StoredTokens, following, is_same_place, stored_tokens
from stage_harvest.tokens.template import ChatRenderer
from stage_harvest.tokens.tokenise import Tokeniser

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarvestJob:
    """Everything about a harvest but the number of contexts, which may have to wait for the tokens."""

    cfg: HarvestSchema
    config: PretrainedConfig
    hooks: list[HookPoint]
    modules: list[ModuleSite]
    identity: ModelIdentity
    tokenizer: PreTrainedTokenizerBase | None
    """None where the model has none, and the corpus may do without."""
    no_tokenizer: str
    """Why there is none."""
    chats: ChatRenderer | None
    corpus: Corpus
    stored: StoredTokens | None
    """The corpus, where it is the tokens of a store."""
    vision: VisionReader | None = None
    """How the model reads images; None where the corpus has none."""
    deepstack: int = 0
    """Behind how many layers the model adds features of images to the stream."""

    @classmethod
    def from_config(cls, cfg: HarvestSchema) -> "HarvestJob":
        """Resolve model, hooks, tokenizer and corpus; raises GranaryError for the first that is wrong.

        Cheap: no weights are read and no document but for the corpus's fingerprint.
        """
        if isinstance(cfg.corpus, BatchesCorpus):
            raise GranaryError("corpus=batches are those of a function of your own: name it by model.factory")
        stored = stored_tokens(cfg)
        if stored is not None:
            cfg = following(cfg, stored.store, given_keys())
        whole = load_trunk_config(cfg.model.path, cfg.model.revision)
        config = whole.get_text_config(decoder=True)
        if whole is not config:
            check_multimodal(cfg, whole)
        hooks, modules = chosen_hooks(cfg, whole)
        check_tensor_parallel(config, cfg.tensor_parallel)
        if cfg.model.quantisation is not None:
            quantisation_config(cfg.model.quantisation)
            if cfg.tensor_parallel > 1:
                raise GranaryError("model.quantisation does not go with tensor_parallel: use replicas instead")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and cfg.packing.seq_len > limit:
            raise GranaryError(
                f"packing.seq_len={cfg.packing.seq_len}, but the model has {limit} positions:"
                f" set packing.seq_len={limit} or less"
            )
        if modules and cfg.tensor_parallel > 1:
            raise GranaryError("hooks.modules does not go with tensor_parallel, which splits modules: use replicas")
        if cfg.batch_contexts is not None and cfg.batch_contexts < 1:
            raise GranaryError(f"batch_contexts={cfg.batch_contexts}: it must be at least 1, or null")
        if cfg.corpus.contexts is not None and cfg.corpus.contexts < 1:
            raise GranaryError(f"corpus.contexts={cfg.corpus.contexts}: it must be at least 1, or null for all")
        if cfg.tokenise_workers is not None and cfg.tokenise_workers < 0:
            raise GranaryError(f"tokenise_workers={cfg.tokenise_workers}: it must be at least 0, or null")
        if any(part.startswith("memory:") for part in cfg.store.url.split("::")):
            raise GranaryError(f"store.url={cfg.store.url}: nothing of it would outlive this process; give a folder")
        today = parse_date(cfg.chat.date)
        identity = model_identity(cfg.model.path, cfg.model.revision, cfg.model.dtype.value)
        if stored is not None:
            return cls(cfg, config, hooks, modules, identity, None, "", None, stored, stored)
        corpus = open_corpus(cfg.corpus)
        has_images = isinstance(corpus, CorpusSource) and corpus.has_images
        vision = VisionReader.load(cfg.model.path, cfg.model.revision) if has_images else None
        if vision is None and cfg.chat.mark_assistant:
            raise GranaryError("chat.mark_assistant=true goes with corpus.images: leave it out")
        tokenizer, no_tokenizer = None, ""
        try:
            tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision)
        except GranaryError as error:
            if needs_tokenizer(corpus) or vision is not None:
                raise
            no_tokenizer = str(error)
            log.info("no tokenizer: the corpus must hold token ids, and special tokens are not known")
        if vision is not None and tokenizer is not None and vision.chat_template is not None:
            tokenizer.chat_template = vision.chat_template
        chats = None if tokenizer is None else ChatRenderer(tokenizer, today, cfg.chat.variables)
        job = cls(
            cfg,
            config,
            hooks,
            modules,
            identity,
            tokenizer,
            no_tokenizer,
            chats,
            corpus,
            None,
            vision,
            deepstack_layers(whole),
        )
        if cfg.chat.mark_assistant and chats is not None:
            chats.require_generation_tags()
        return job

    @property
    def batch_contexts(self) -> int:
        chosen = self.cfg.batch_contexts
        default = default_batch_contexts(self.cfg.packing.seq_len, self.cfg.store.shard_contexts)
        return default if chosen is None else min(chosen, self.cfg.store.shard_contexts)

    @property
    def _quantisation(self) -> dict[str, str]:
        scheme = self.cfg.model.quantisation
        return {} if scheme is None else {"quantisation": scheme}

    @property
    def depth(self) -> tuple[int, bool]:
        """(layers to load, whether the last of them needs its MLP)."""
        depth, last_mlp = needed_depth(self.hooks) if self.hooks else (1, False)
        for site in self.modules:
            if site.layer is not None and site.layer + 1 >= depth:
                depth, last_mlp = site.layer + 1, True
        if depth <= self.deepstack and any(hook.layer == depth for hook in self.hooks):
            return depth + 1, False  # what goes into that layer is more than what came out of the one before
        return depth, last_mlp

    @property
    def points(self) -> list[Point]:
        """Every place that is kept."""
        return [*self.hooks, *(site.point for site in self.modules)]

    @property
    def widths(self) -> dict[str, int]:
        """Features of each site, by its name in the store."""
        widths = {str(hook): self.config.hidden_size for hook in self.hooks}
        return widths | {site.point.site: site.width for site in self.modules}

    @cached_property
    def special(self) -> SpecialIds:
        if self.stored is not None:
            return self.stored.special
        if self.tokenizer is None:
            return SpecialIds(bos=None, eos=None, pad=0, all=())
        return special_ids(self.tokenizer)

    def tokeniser(self, workers: int, folder: Path | None = None) -> Tokeniser:
        """What makes ids of the corpus, in `workers` processes; finished batches are kept in `folder`."""
        serialised = "" if self.tokenizer is None else self.tokenizer.backend_tokenizer.to_str()
        encoder = TextEncoder(serialised, workers=workers, folder=folder)
        return Tokeniser(self.config.vocab_size, self.tokenizer, self.chats, encoder, self.no_tokenizer)

    @property
    def marks_assistant(self) -> bool:
        """Whether what the assistant said is marked: where it is asked for, or the chat template can tell."""
        asked = self.cfg.chat.mark_assistant
        return (self.chats is not None and self.chats.has_generation_tags) if asked is None else asked

    def pictured_tokeniser(self) -> PicturedTokeniser:
        """What makes contexts of a corpus with images."""
        assert self.vision is not None
        assert self.tokenizer is not None
        assert self.chats is not None
        return PicturedTokeniser(
            self.vision, self.tokenizer, self.chats, self.packer, self.special, self.marks_assistant
        )

    @cached_property
    def packer(self) -> Packer:
        packer = Packer.from_config(self.cfg.packing, self.special)
        if self.cfg.packing.bos is not BosPlacement.none and packer.bos_id is None:
            log.info("the tokenizer has no BOS token: documents start without one")
        return packer

    @cached_property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint()

    @property
    def window_bytes(self) -> int | None:
        """The bytes that store.window says. Raises GranaryError for what is no size."""
        return window_bytes(self.cfg)

    def store_plan(
        self, num_contexts: int, isolation: str | None = None, existing: StorePlan | None = None
    ) -> StorePlan:
        """The store's plan once the number of contexts is known; `isolation` says what is known of packed documents.

        The chat template belongs to it where chats have become tokens: now, or when the `existing` store was made.
        """
        return planned_store(
            self.cfg,
            num_contexts,
            self.widths,
            provenance={
                "model": {**self.identity, **self._quantisation},
                **(self._token_identity(existing) if self.stored is None else self.stored.identity()),
                **self._image_identity(),
                "batch_contexts": self.batch_contexts,
            },
            versions={**self._versions(), **({} if isolation is None else {"isolation": isolation})},
        )

    def _token_identity(self, existing: StorePlan | None) -> dict[str, Any]:
        """What decides the tokens: tokenizer, corpus and packing, as the provenance has them."""
        cfg, packing = self.cfg, self.cfg.packing
        return {
            "tokenizer": {
                "hash": None if self.tokenizer is None else tokenizer_hash(self.tokenizer),
                "special_ids": self.special.to_dict(),
                **self._chat_identity(existing),
            },
            "corpus": {
                "description": self.corpus.description,
                "fingerprint": self.fingerprint,
                "contexts": cfg.corpus.contexts,
                "shuffle_seed": cfg.seed if cfg.corpus.shuffle else None,
                "shuffle_window": cfg.corpus.shuffle_window if cfg.corpus.shuffle else None,
            },
            "packing": {
                "mode": packing.mode.value,
                "bos": packing.bos.value,
                "long_documents": packing.long_documents.value,
                "drop_last": packing.drop_last,
                "mask_special": packing.mask_special,
                **({"mask_first": self.packer.mask_first} if self.packer.mask_first else {}),
            },
        }

    def _image_identity(self) -> dict[str, Any]:
        """What decides pixels and kinds, in a store that has them."""
        if self.vision is None:
            return {}
        return {layout.IMAGES: {**self.vision.identity(), "assistant": self.marks_assistant}}

    @cached_property
    def place(self) -> str | ObjectIO:
        """Where the store is written: its URL, or the place of an addition to the store that the tokens come from.

        Raises GranaryError where the sites can't be added there.
        """
        if self.stored is None or not is_same_place(self.stored.store.url, self.cfg.store.url):
            return self.cfg.store.url
        if self.cfg.store.window is not None:
            raise GranaryError("store.window does not go with sites that are added to a store: leave it out")
        return place_of_addition(self.stored.store, self.store_plan(self.stored.store.num_contexts))

    def _chat_identity(self, existing: StorePlan | None) -> dict[str, Any]:
        if self.chats is None:
            return {}
        before = {} if existing is None else existing.provenance.get("tokenizer", {}).get("chat", {})
        if self.cfg.chat.date is None and "date" in before:
            self.chats.today = date.fromisoformat(before["date"])
        return {"chat": self.chats.identity()} if self.chats.used or before else {}

    def _versions(self) -> dict[str, str]:
        """What was used and does not belong to the identity; the last bits of floats may depend on it."""
        return {
            **software_versions("torch", "transformers", "tokenizers", "numpy"),
            **({} if self.vision is None else software_versions("pillow")),
            "model_path": str(resolve_model(self.cfg.model.path, self.cfg.model.revision).absolute()),
        }


def chosen_hooks(cfg: HarvestSchema, config: PretrainedConfig) -> tuple[list[HookPoint], list[ModuleSite]]:
    """The sites and the modules that are asked for; raises GranaryError where the model lacks one."""
    wanted, targets = cfg.hooks, targets_of(cfg.hooks)
    modules = module_sites(config, targets) if targets else []
    sites = wanted.sites if wanted.sites is not None else [] if modules else ["resid_post"]
    if not sites and not modules:
        raise GranaryError("hooks.sites is empty: name at least one, for example hooks.sites=[resid_post]")
    layers = ",".join(map(str, wanted.layers)) if isinstance(wanted.layers, list) else str(wanted.layers)
    hooks = hook_points(layers, dict.fromkeys(sites), config.get_text_config(decoder=True).num_hidden_layers)
    check_hooks(config, hooks)
    return hooks, modules


def targets_of(wanted: HooksSchema) -> list[str]:
    """What hooks.modules names, as a list; raises GranaryError for what is no name."""
    targets = [wanted.modules] if isinstance(wanted.modules, str) else wanted.modules or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise GranaryError(f"hooks.modules={wanted.modules}: a path of a module, a pattern re:..., or a list of them")
    return targets


def check_multimodal(cfg: HarvestSchema, config: PretrainedConfig) -> None:
    """Raise GranaryError for what a vision-language model can't be harvested with."""
    name = f"model {cfg.model.path} ({config.model_type}) reads images beside text"
    if cfg.packing.mode is not PackingMode.separate:
        raise GranaryError(f"{name}: its rows are run one by one, set packing=separate")
    if cfg.hooks.modules is not None:
        raise GranaryError(f"{name}: hooks.modules is for text decoders, give hooks.layers and hooks.sites")
    if cfg.model.quantisation is not None:
        raise GranaryError(f"{name}: model.quantisation is for text decoders, use tensor_parallel or fewer layers")


def needs_tokenizer(corpus: Corpus) -> bool:
    """Whether the corpus, or a part of it, is known to be text before it is read."""
    if isinstance(corpus, Mixture):
        return any(part.source.is_text for part in corpus.parts.values())
    return isinstance(corpus, CorpusSource) and corpus.is_text


def parse_date(text: str | None) -> date:
    """``2026-11-26`` as a date, None as today; raises GranaryError for anything else."""
    try:
        return date.today() if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise GranaryError(f"chat.date={text}: write the day as 2026-11-26, or null for today") from error


def check_length(job: HarvestJob, num_contexts: int) -> None:
    """Raise GranaryError when the corpus gave `num_contexts` contexts and that is none, or fewer than asked."""
    asked, seq_len = job.cfg.corpus.contexts, job.cfg.packing.seq_len
    if num_contexts == 0:
        raise GranaryError(f"the corpus ({job.corpus.description}) fills no context of {seq_len} tokens")
    if asked is not None and num_contexts < asked:
        raise GranaryError(
            f"the corpus ends early: it fills {num_contexts} contexts of {seq_len} tokens, {asked} were asked for:"
            f" set corpus.contexts={num_contexts}, or null for all there are"
        )


def staging_dtype(plan: StorePlan, model_dtype: torch.dtype) -> torch.dtype:
    """What the forward leaves for the store: the stored type, or the model's where the store quantises."""
    return model_dtype if plan.dtype == "int8" else storage_type(plan.dtype).storage


def window_bytes(cfg: HarvestSchema) -> int | None:
    """The bytes that store.window says. Raises GranaryError for what is no size."""
    return None if cfg.store.window is None else parse_bytes(cfg.store.window, "store.window")


def planned_store(
    cfg: HarvestSchema,
    num_contexts: int,
    widths: Mapping[str, int],
    *,
    provenance: dict[str, Any],
    versions: dict[str, str],
) -> StorePlan:
    """The plan of the store that the configuration asks for."""
    return StorePlan(
        num_contexts=num_contexts,
        seq_len=cfg.packing.seq_len,
        hooks=dict(widths),
        dtype=cfg.store.dtype,
        shard_contexts=cfg.store.shard_contexts,
        chunk_tokens=cfg.store.chunk_tokens,
        codec=cfg.store.codec,
        heldout_fraction=cfg.store.heldout_fraction,
        heldout_placement=cfg.store.heldout_placement.value,
        provenance=provenance,
        versions=versions,
    )
