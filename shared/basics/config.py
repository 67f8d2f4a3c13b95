"""Schemas of the config groups that more than one stage uses.

Fields have types and meanings here and values in ``conf/``: a schema that also held defaults would be a second place
to look. What else is to be known of a key stands beside its field too, by ``key``. Stage schemas are in
``stage_*/config.py``; the SAE's own configuration, which lives in checkpoints, is ``shared.sae.SAEConfig``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What a stage does with a key, beside giving it to the code that reads it."""

    identity: bool = True
    """The result depends on it: a run that is continued must be given the same value."""
    shared: bool = False
    """Runs that read one stream in one process group must be given the same value."""
    named: bool = True
    """The folders of a sweep carry its value in their names."""
    count: bool = False
    """It counts something, so that the command line may say 50M or 1e6."""

    def within(self, group: "Marks") -> "Marks":
        """Those of a key of a group that has marks itself: either may free it."""
        return Marks(
            identity=self.identity and group.identity,
            shared=self.shared or group.shared,
            named=self.named and group.named,
            count=self.count,
        )


def key(
    default: Any = MISSING, *, identity: bool = True, shared: bool = False, named: bool = True, count: bool = False
) -> Any:
    """A field of a schema with ``Marks``; of a group, they are those of all its keys. A class is its own factory."""
    metadata = {"marks": Marks(identity=identity, shared=shared, named=named, count=count)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def marks(schema: type, prefix: str = "", group: Marks | None = None) -> Iterator[tuple[str, Marks]]:
    """Every key of a schema and of the schemas in it, dotted, with its marks: ``("optim.lr", Marks(...))``."""
    for one in fields(schema):
        own = one.metadata.get("marks", Marks()).within(group or Marks())
        if isinstance(one.type, type) and is_dataclass(one.type):
            yield from marks(one.type, f"{prefix}{one.name}.", own)
        else:
            yield f"{prefix}{one.name}", own


class ModelDtype(Enum):
    """Precision of the language model's weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True)
class ModelSchema:
    """Group ``model``: which language model."""

    path: str = MISSING
    """Local folder in Hugging Face form, a hub id, or ``bundled``."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: ModelDtype = MISSING
    """Precision of weights and arithmetic; the store's dtype is separate."""
    quantisation: str | None = None
    """How the weights are quantised as they are loaded: bnb_int8, bnb_nf4, torchao_int8; null: none."""
    probe: bool = True
    """Before a harvest of isolated documents, compare some of them packed and alone; false trusts the model."""
    attn_implementation: str = MISSING
    """Attention kernel as transformers names it: sdpa, eager, flash_attention_2, flex_attention."""
    factory: str | None = None
    """A function of your own, ``package:function``, that makes any torch module and its batches, in the place of
    ``path`` (docs/harvest_modules.md); with corpus=batches."""


class TokenKind(Enum):
    """What a position of a store with images holds."""

    text = "text"
    image = "image"
    """A region of an image."""
    assistant = "assistant"
    """Text that the assistant said; it is text too."""


class Split(Enum):
    """Which contexts of the store."""

    heldout = "heldout"
    """Those of the held-out shards, which training never reads."""
    train = "train"
    all = "all"


@dataclass(kw_only=True)
class StoreBeside:
    """A store of another model on the same tokens."""

    name: str = MISSING
    """What its sites are called by: ``chat`` for chat:layers.8.resid_post."""
    url: str = MISSING
    """Folder or fsspec URL of an activation store."""


def named_urls(beside: Sequence[StoreBeside]) -> list[tuple[str, str]]:
    """Name and URL of each, as ``shared.store.beside`` takes them."""
    return [(one.name, one.url) for one in beside]


@dataclass(kw_only=True)
class StoreInput:
    """Which activations to work on."""

    url: str = MISSING
    """Folder or fsspec URL of an activation store."""
    beside: list[StoreBeside] = MISSING
    """Stores of other models on the same tokens: 'store.beside=[{name:chat,url:s3://bucket/chat}]'."""


@dataclass(kw_only=True)
class ModelInput:
    """The language model that was harvested; null takes what the store, or what was trained from it, records."""

    path: str | None = MISSING
    """Local folder in Hugging Face form, a hub id, or ``bundled``."""
    revision: str | None = MISSING
    """Hub revision (branch, tag or commit)."""
    dtype: ModelDtype | None = MISSING
    """Precision of weights and arithmetic."""
    allow_other: bool = MISSING
    """Accept a model that differs from the harvested one, for example a fine-tuned version of it."""


@dataclass(kw_only=True)
class EvaluatedModel(ModelInput):
    """One that runs as it is."""

    attn_implementation: str = MISSING
    """Attention kernel as transformers names it."""


@dataclass(kw_only=True)
class DeviceSchema:
    """Group ``device``: where tensors live."""

    name: str = MISSING
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda``."""
    threads: int | None = None
    """CPU threads for torch; null leaves torch's choice."""


def register() -> None:
    """Put the shared group schemas into Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(group="model", name="schema", node=ModelSchema)
    store.store(group="device", name="schema", node=DeviceSchema)
