"""Schema of the harvest: what ``conf/harvest.yaml`` and the groups corpus, packing and store may hold.

Types and meanings here, values in ``conf/``. Imports nothing heavy, so that a wrong key is reported at once.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import shared.basics.config
from shared.basics.config import DeviceSchema, ModelSchema, key


class PackingMode(Enum):
    """Whether documents that share a context see one another."""

    isolated = "isolated"
    """Attention stays inside a document and positions restart: each document as if it were alone."""
    joined = "joined"
    """One causal sequence: a document sees those before it in its context."""
    separate = "separate"
    """One document per context, run alone and at its own length, whatever the model; the rest of the context is
    padding."""


class BosPlacement(Enum):
    """Where BOS is put. A document whose ids begin with BOS already gets no second one."""

    none = "none"
    document = "document"
    """Before each document; a document that goes on in the next context goes on there without BOS."""
    context = "context"
    """Before each document and at the start of each context, so no trainable position is an attention sink."""


class LongDocuments(Enum):
    """What happens to the part of a document that does not fit into its context."""

    split = "split"
    """It goes on in the next context."""
    truncate = "truncate"
    """It is dropped: every document is seen from its start, and the next context begins with a new one."""


class HeldoutPlacement(Enum):
    """Which shards are held out."""

    spread = "spread"
    last = "last"


class StdlibSplit(Enum):
    """Which files of the standard library; the bundled model was trained on ``train``."""

    train = "train"
    heldout = "heldout"
    all = "all"


@dataclass(kw_only=True)
class HooksSchema:
    """Which activations are stored; all of them in one forward."""

    layers: Any = MISSING
    """``all``, ``16``, ``0-7`` or a list ``[0,8,16-20]``; layers are counted from 0."""
    sites: list[str] | None = MISSING
    """Of resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post (docs/harvest.md); null: resid_post, or
    none where modules are named."""
    modules: Any = MISSING
    """Modules of the decoder's layers: a path such as ``layers.2.mlp.down_proj:in``, a pattern ``re:.*o_proj``, or a
    list of them (docs/harvest.md); null: none."""


@dataclass(kw_only=True)
class PackingSchema:
    """Group ``packing``: how documents become contexts."""

    mode: PackingMode = MISSING
    seq_len: int = key(count=True)
    """Tokens per context, T."""
    bos: BosPlacement = MISSING
    long_documents: LongDocuments = MISSING
    drop_last: bool = MISSING
    """Leave out the last context when documents do not fill it; else it is padded (and the padding masked)."""
    mask_special: bool = MISSING
    """Mask BOS, EOS and the tokenizer's other special tokens, so that nothing trains on them."""
    mask_first: int | None = MISSING
    """Mask so many positions at the start of each document (of each context, where documents are joined). null: 1 where
    documents begin without BOS, whose first token is then the attention sink, else 0."""


@dataclass(kw_only=True)
class ChatSchema:
    """How chat messages become text, beside the tokenizer's template; part of the store's identity where it has any."""

    date: str | None = MISSING
    """The day that a template may write, 2026-11-26; null: today, or the day of the store that is continued."""
    variables: dict[str, Any] = MISSING
    """What else the template reads, for example {enable_thinking: false}."""
    mark_assistant: bool | None = MISSING
    """With corpus.images: mark what the assistant said, by the template's generation tags, so that stream.kinds can
    choose it; null: where the template has them."""


@dataclass(kw_only=True)
class CorpusSchema:
    """What every kind of corpus has; group ``corpus``."""

    contexts: int | None = key(count=True)
    """Stop after so many contexts; null takes the whole corpus."""
    shuffle: bool = MISSING
    """Shuffle files, then documents within a moving window; a function of ``seed`` alone."""
    shuffle_window: int = key(count=True)
    """Documents held in memory to shuffle among."""


@dataclass(kw_only=True)
class StdlibCorpus(CorpusSchema):
    """The standard library of the running interpreter: a corpus that is on every machine."""

    split: StdlibSplit = MISSING
    include_tests: bool = MISSING
    """Also the library's own tests, more than half of it."""


@dataclass(kw_only=True)
class TextCorpus(CorpusSchema):
    """UTF-8 text files, also compressed (.gz, .bz2, .xz, .zst)."""

    files: str = MISSING
    """Path, glob or fsspec URL."""
    separator: str | None = MISSING
    """A line that ends a document, for example <|endoftext|>; null: each file is one document."""


@dataclass(kw_only=True)
class JsonlCorpus(CorpusSchema):
    """One JSON object per line, also compressed."""

    files: str = MISSING
    """Path, glob or fsspec URL."""
    field: str = MISSING
    """The object's field: text, or a list of chat messages (then through the tokenizer's chat template)."""
    images: str | None = MISSING
    """The field of the images that a row's placeholders stand for: a list of {bytes, path}, bytes, or paths below the
    folder of the file (docs/vision.md); null: the corpus has none."""


@dataclass(kw_only=True)
class ParquetCorpus(CorpusSchema):
    """Parquet files."""

    files: str = MISSING
    """Path, glob or fsspec URL."""
    column: str = MISSING
    """Text, chat messages (then through the tokenizer's chat template), or lists of token ids."""
    images: str | None = MISSING
    """The column of the images that a row's placeholders stand for: a list of {bytes, path}, bytes, or paths below the
    folder of the file (docs/vision.md); null: the corpus has none."""


@dataclass(kw_only=True)
class HubCorpus(CorpusSchema):
    """A dataset of the Hugging Face hub, streamed; needs the extra ``hub``."""

    path: str = MISSING
    """Hub id, or a local folder that ``datasets`` can read."""
    config: str | None = MISSING
    """The dataset's configuration (subset)."""
    split: str = MISSING
    """Part of the dataset, as it names them."""
    revision: str | None = MISSING
    """Branch, tag or commit; give a commit to be able to make the same store later."""
    column: str = MISSING
    """Text, chat messages, or lists of token ids."""
    images: str | None = MISSING
    """The column of the images that a row's placeholders stand for (docs/vision.md); null: the corpus has none."""


@dataclass(kw_only=True)
class TokensCorpus(CorpusSchema):
    """Token ids made elsewhere with this model's tokenizer: .npy arrays or raw .bin files."""

    files: str = MISSING
    """Path, glob or fsspec URL. Each row of a 2-D .npy is a document."""
    dtype: str = MISSING
    """Of raw .bin files: uint16, uint32, int32 or int64; a .npy file knows its own."""
    document_end: int | None = MISSING
    """Token id that ends a document in a 1-D array and stays its last token; null: one document per file."""


@dataclass(kw_only=True)
class StoreCorpus(CorpusSchema):
    """The tokens of a store that exists, at other sites or with another model; how they are packed is the store's."""

    path: str = MISSING
    """Folder or fsspec URL of the store. With the same store.url the sites are added to it, else a store on the same
    tokens is made beside it."""


@dataclass(kw_only=True)
class ImagesCorpus(CorpusSchema):
    """Images, for a model that reads nothing else (ViT, the vision tower of CLIP); needs the extra ``vision``."""

    files: str = MISSING
    """Path, folder, glob or fsspec URL: of images, or where a column is named of parquet files."""
    column: str | None = MISSING
    """Column of {bytes, path}, bytes, or paths below the folder of the parquet file; null: each file is an image."""


@dataclass(kw_only=True)
class AudioCorpus(CorpusSchema):
    """Sounds, for a model that reads nothing else (Whisper's encoder, wav2vec 2)."""

    files: str = MISSING
    """Path, folder, glob or fsspec URL: of uncompressed WAV files, or where a column is named of parquet files."""
    column: str | None = MISSING
    """Column of a WAV file's bytes, or of {array, sampling_rate}; null: each file is a sound."""


@dataclass(kw_only=True)
class BatchesCorpus(CorpusSchema):
    """The batches that ``model.factory`` makes."""


@dataclass(kw_only=True)
class MixtureCorpus(CorpusSchema):
    """Several corpora, by weight."""

    parts: Any = MISSING
    """Name to kind, weight (share of the tokens, any scale) and the keys of that kind:
    '{web: {kind: hub, path: ..., weight: 0.8}, code: {kind: stdlib, weight: 0.2}}'."""


SOURCE_KINDS: dict[str, type[CorpusSchema]] = {
    "stdlib": StdlibCorpus,
    "text": TextCorpus,
    "jsonl": JsonlCorpus,
    "parquet": ParquetCorpus,
    "hub": HubCorpus,
    "tokens": TokensCorpus,
}


@dataclass(kw_only=True)
class StoreSchema:
    """Group ``store``: the activation store to write."""

    url: str = MISSING
    """Folder or fsspec URL."""
    dtype: str = MISSING
    """bfloat16, float16, float32 or int8."""
    shard_contexts: int = MISSING
    """Contexts per shard object: the unit of writing, resuming and holding out."""
    chunk_tokens: int = MISSING
    """Positions per chunk inside a shard, at most seq_len."""
    codec: str = MISSING
    """none, lz4 or zstd."""
    heldout_fraction: float = MISSING
    """Share of the shards that training never reads."""
    heldout_placement: HeldoutPlacement = MISSING
    window: str | int | None = MISSING
    """Most bytes of activations that the harvest may be ahead of training, which deletes what it has passed: 2TB,
    500GB, or bytes; null keeps all. See docs/store_window.md."""


@dataclass(kw_only=True)
class HarvestSchema:
    """``conf/harvest.yaml``."""

    name: str = MISSING
    """Name of the run; its folder is ``run_dir``."""
    run_dir: str = MISSING
    """Folder of the run: its store, logs, and what later stages leave."""
    seed: int = MISSING
    """Decides the order of documents when the corpus is shuffled."""
    nproc: int = MISSING
    """Processes on this machine, each a replica of the model; more machines by `make harvest NNODES=...`."""
    model: ModelSchema = field(default_factory=ModelSchema)
    corpus: CorpusSchema = field(default_factory=CorpusSchema)
    chat: ChatSchema = field(default_factory=ChatSchema)
    packing: PackingSchema = field(default_factory=PackingSchema)
    store: StoreSchema = field(default_factory=StoreSchema)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    hooks: HooksSchema = field(default_factory=HooksSchema)
    tensor_parallel: int = MISSING
    """Processes that share one copy of the model, a part of each weight each; the others are replicas."""
    batch_contexts: int | None = MISSING
    """Contexts per forward; null: as many as make 4,096 tokens. Part of the store's identity (see forward.py)."""
    dry_run: bool = MISSING
    """Print the plan and stop."""
    tokenise_workers: int | None = MISSING
    """Processes that tokenise; null: one per core, 0: none but this one. The tokens do not depend on it."""
    spool_dir: str = MISSING
    """Local folder where tokens wait until the store has them (13 bytes each); a killed harvest goes on from there."""


def register() -> None:
    """Put the schemas into Hydra's ConfigStore."""
    shared.basics.config.register()
    store = ConfigStore.instance()
    store.store(name="harvest_schema", node=HarvestSchema)
    store.store(group="packing", name="schema", node=PackingSchema)
    store.store(group="store", name="schema", node=StoreSchema)
    for kind, node in {
        **SOURCE_KINDS,
        "store": StoreCorpus,
        "mixture": MixtureCorpus,
        "batches": BatchesCorpus,
        "images": ImagesCorpus,
        "audio": AudioCorpus,
    }.items():
        store.store(group="corpus", name=f"{kind}_schema", node=node)
