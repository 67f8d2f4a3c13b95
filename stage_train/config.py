"""Schema of training: what ``conf/train.yaml`` and the groups sae, optim, schedule, stream, parallel, logger may hold.

Types and meanings here, values in ``conf/``. Imports nothing heavy, so that a wrong key is reported at once.
"""

import copy
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import MISSING, OmegaConf

import shared.basics.config
from shared.basics.config import DeviceSchema, StoreBeside, TokenKind, key, marks
from shared.basics.display import all_masked
from stage_train.sae_schema import SAESchema

LONGEST_FOLDER = 200
"""Bytes of the name of a run's folder; what lies beside it adds to the name, and file systems take 255."""


class DecayShape(Enum):
    """How the learning rate falls at the end."""

    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"


class KShape(Enum):
    """How k falls from k_start to sae.k."""

    linear = "linear"
    exponential = "exponential"


class OptimKind(Enum):
    """Rule of the update; see shared.sae.optim."""

    adam = "adam"
    adam8bit = "adam8bit"
    muon = "muon"
    signum = "signum"


class MomentType(Enum):
    """bfloat16 halves the optimiser's memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class BufferPlace(Enum):
    """Which memory holds the contexts that are being mixed."""

    auto = "auto"
    """The GPU's when they take at most a quarter of what is free there, else the host's."""
    host = "host"
    device = "device"


class OnDamage(Enum):
    """What to do when a context that is needed fails its checksum, is missing or cut off."""

    stop = "stop"
    """End the run with one line that names the shard."""
    skip = "skip"
    """Leave its tokens out of the batches they belong to; log each shard, count the tokens in the metrics."""


class Resume(Enum):
    """What to do with the checkpoints of an earlier run in the same folder."""

    auto = "auto"
    """Continue from the newest, where there is one."""
    never = "never"
    """Remove them and begin anew."""
    must = "must"
    """Continue from the newest; an error without one."""


class LayoutKind(Enum):
    """What each process holds."""

    ddp = "ddp"
    """The whole SAE."""
    fsdp = "fsdp"
    """A share of the rows of every parameter, gathered for each step."""
    latent = "latent"
    """A share of the latents, which it alone computes."""
    layers = "layers"
    """Layers of a clt: it reads what they read and write alone."""


class LoggerKind(Enum):
    """Where metrics go beside ``metrics.jsonl``."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class WandbMode(Enum):
    """Whether wandb sends its records, keeps them here or does nothing; named as wandb does."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class FurtherStore:
    """A store that is read together with the first."""

    url: str = MISSING
    """Folder or fsspec URL of an activation store."""
    weight: float = MISSING
    """Times each of its tokens is read per epoch."""


@dataclass(kw_only=True)
class StoreInput:
    """Which activations to train on."""

    url: str = key(identity=False, named=False)  # a checkpoint knows the store by its digest
    """Folder or fsspec URL of an activation store. It need not be complete: what is committed now is used."""
    weight: float = MISSING
    """Times each of its tokens is read per epoch."""
    others: list[FurtherStore] = key(identity=False)
    """Further stores, read as one with the first: 'store.others=[{url:s3://bucket/store,weight:0.5}]'."""
    beside: list[StoreBeside] = key(identity=False)  # reads and writes name them, a checkpoint knows their digests
    """Stores of other models on the same tokens, whose sites stand beside the first's:
    'store.beside=[{name:chat,url:s3://bucket/chat}]'. Refused unless tokens, mask and segments agree."""


@dataclass(kw_only=True)
class StreamSchema:
    """Group ``stream``: the order of tokens, and how far to read ahead. See docs/stream.md."""

    seed: int | None = MISSING
    """Of the order of tokens; null: the run's seed."""
    batch_size: int = key(count=True)
    """Tokens per step, all processes together."""
    lanes: int = MISSING
    """Virtual readers; a multiple of the number of processes."""
    mix_contexts: int = MISSING
    """Contexts whose tokens each lane mixes. lanes x mix_contexts contexts are held in memory."""
    drop_last: bool = MISSING
    """Leave out an epoch's last batch when it is short."""
    max_norm_multiple: float | None = MISSING
    """Drop tokens whose norm is above this multiple of the median; null keeps all."""
    kinds: list[TokenKind] | None = MISSING
    """Of a store with images: learn from tokens of these kinds alone, text, image, assistant (docs/vision.md); null:
    from all trainable ones."""
    prefetch_gib: float = key(identity=False)
    """Memory for reading ahead, all processes together, beside what is being mixed."""
    io_threads: int = key(identity=False)
    """Reading threads per process."""
    buffer: BufferPlace = key(identity=False)
    on_damage: OnDamage = key(identity=False)  # a run that stopped at a damaged shard can go on without it


@dataclass(kw_only=True)
class OptimSchema:
    """Group ``optim``: the update of the weights."""

    kind: OptimKind = MISSING

    lr: int | float | str = MISSING
    """Peak learning rate; by_width: 1e-2 sqrt(2048 / F); by_width_and_length: that, and times sqrt(2000 / steps) in
    longer runs; auto: 2e-4 / sqrt(F / 2^14)."""
    decoder_factor: float = MISSING
    """W_dec learns at lr times this."""
    bias_factor: int | float | str = MISSING
    """b_enc learns at lr times this; by_width: 6 sqrt(F / 2048), or 1 for gated."""
    beta1: float | None = MISSING
    """Decay of Adam's first moment, and of muon's for the vectors; null for signum."""
    beta2: float | None = MISSING
    """Decay of Adam's second moment, likewise."""
    eps: float | None = MISSING
    """Added to the root of Adam's second moment, likewise."""
    momentum: float | None = MISSING
    """Decay of muon's and signum's momentum; null for adam."""
    moments: MomentType | None = MISSING
    """In which adam keeps its moments; null for the others."""
    clip_norm: float | None = MISSING
    """Largest global gradient norm; null does not clip."""
    micro_batch: int | None = key(identity=False, count=True)
    """Most rows per forward and process, to bound memory; null: the whole batch at once."""
    ema_decay: float | None = MISSING
    """Moving average of the weights, per step; null keeps none."""
    ema_export: bool = MISSING
    """Export the average in place of the last weights."""
    spike_factor: float | None = MISSING
    """Leave out a step whose loss is above this multiple of the last ones' mean, or not finite; null takes all. With
    it every step waits for the device."""


@dataclass(kw_only=True)
class ComputeSchema:
    """How a step is computed. See docs/kernels.md."""

    kernels: str = key(identity=False)
    """auto (triton on a GPU, torch on a CPU), triton, torch, or reference (dense, slow). The results differ by rounding
    alone."""
    dtype: str = MISSING
    """Type of the matrix products: float32, bfloat16, or auto: bfloat16 on a GPU and float32 on a CPU. Weights, moments
    and the selection are float32 in either. A processor without bfloat16 instructions uses float32 for it, and says
    so."""


@dataclass(kw_only=True)
class ScheduleSchema:
    """Group ``schedule``: how long, and the learning rate along the way."""

    tokens: int | None = key(count=True)
    """Length of the run in tokens; it ends with the first batch that reaches it."""
    epochs: float | None = MISSING
    """Length in passes over the store; give this or tokens."""
    warmup: int | float = MISSING
    """Linear warm-up: a whole number of steps, or a share of the run up to 1.0."""
    decay: int | float = MISSING
    """Decay at the end, likewise; 1.0 is all that follows the warm-up."""
    shape: DecayShape = MISSING
    final: float = MISSING
    """Learning rate at the end, as a share of the peak."""
    k_start: int | None = MISSING
    """k of the first steps, above sae.k; null: sae.k from the beginning."""
    k_cold: int | float = MISSING
    """How long k_start lasts: a whole number of steps, or a share of the run up to 1.0."""
    k_warmup: int | float = MISSING
    """How long k then falls to sae.k, likewise."""
    k_shape: KShape = MISSING
    penalty_warmup: int | float = MISSING
    """Linear warm-up of the sparsity penalty, likewise."""


@dataclass(kw_only=True)
class ParallelSchema:
    """Group ``parallel``: how the SAE is spread over the processes of a run. The result does not depend on it."""

    layout: LayoutKind = MISSING
    latent: int | None = MISSING
    """Parts the latents are split into; null: as many as there are processes, or with layers none."""


@dataclass(kw_only=True)
class CheckpointSchema:
    """When training state is saved."""

    every: int | float = MISSING
    """Steps between saves, or a share of the run up to 1.0; 0 saves at the end alone."""
    keep: int = MISSING
    """How many are kept."""
    resume: Resume = MISSING


@dataclass(kw_only=True)
class LoggerSchema:
    """Group ``logger``: ``metrics.jsonl`` is always written."""

    every: int = MISSING
    """Steps between lines; nothing waits for the device in between."""
    kinds: list[LoggerKind] = MISSING
    """Of tensorboard, wandb."""
    progress: bool = key(named=False)
    """Show a progress bar."""
    curves: bool = MISSING
    """Draw curves.png at the end."""
    project: str | None = MISSING
    """Weights & Biases project; null: what WANDB_PROJECT says, else granary."""
    mode: WandbMode | None = MISSING
    """Whether Weights & Biases sends anything; null: what WANDB_MODE says, else online."""


@dataclass(kw_only=True)
class TrainSchema:
    """``conf/train.yaml``."""

    name: str = key(identity=False, named=False)
    """Name of the run; its folder is ``run_dir``."""
    run_dir: str = key(identity=False, named=False)
    """Folder of the run: its store, SAEs, sweeps and evaluations."""
    sae_name: str = key(identity=False, named=False)
    """Name of this SAE's folder in ``run_dir``; several SAEs of one store lie side by side."""
    out_dir: str = key(identity=False)
    """Where this SAE goes: checkpoints, metrics, and config.json + sae.safetensors at the end. Where it holds another
    SAE, a folder beside it, named by what differs."""
    seed: int = MISSING
    """Order of the tokens and the initial weights."""
    nproc: int = key(identity=False, shared=True, named=False)
    """Processes on this machine; above 1, the job starts them itself."""
    packed: bool = key(identity=False, named=False)
    """In a sweep (-m): train all its SAEs together, from one pass over the store."""
    hook: str | None = MISSING
    """Which of the store's sites to read and give back; null takes the only one. Short for reads and writes alike."""
    at_layer: int | None = key(identity=False)  # what reads and writes make of it is a part of the run
    """A number that hook, reads and writes may name as ${at_layer}: sweeping it gives a dictionary to each layer."""
    reads: Any = MISSING
    """What the dictionary reads where that is not what it writes: a site of the store, a list, or a pattern such as
    ``layers.*.mlp_in``; several lie side by side. Null: hook."""
    writes: Any = MISSING
    """What it produces, likewise; null: what it reads."""
    init_from: str | None = MISSING
    """Folder or hub id of an SAE whose weights and normalisation are the first ones; null: from data."""
    variant: dict[str, Any] = field(default_factory=dict)
    """Group ``variant``: the kind of dictionary, and what only that kind has."""
    store: StoreInput = key(StoreInput, shared=True)
    sae: SAESchema = field(default_factory=SAESchema)
    optim: OptimSchema = field(default_factory=OptimSchema)
    compute: ComputeSchema = field(default_factory=ComputeSchema)
    schedule: ScheduleSchema = field(default_factory=ScheduleSchema)
    stream: StreamSchema = key(StreamSchema, shared=True)
    parallel: ParallelSchema = key(ParallelSchema, identity=False, shared=True)
    checkpoint: CheckpointSchema = key(CheckpointSchema, identity=False)
    logger: LoggerSchema = key(LoggerSchema, identity=False)
    device: DeviceSchema = key(DeviceSchema, identity=False, shared=True, named=False)


MOST_KEPT = 256
_plain: dict[str, dict[str, Any]] = {}
"""By the configuration's text: what took 40 ms to make."""


def as_dict(cfg: TrainSchema) -> dict[str, Any]:
    """A configuration in plain types, as ``train.yaml`` holds it: secrets in URLs are masked."""
    text = repr(cfg)  # a start asks for the same one again and again, and many runs learn together
    if text not in _plain:
        while len(_plain) >= MOST_KEPT:
            del _plain[next(iter(_plain))]
        config = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
        assert isinstance(config, dict)
        _plain[text] = {str(key): all_masked(value) for key, value in config.items()}
    return copy.deepcopy(_plain[text])


def register(schema: type[TrainSchema] = TrainSchema) -> None:
    """Put the schemas into Hydra's ConfigStore; `schema` is that of the whole."""
    shared.basics.config.register()
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
    OmegaConf.register_new_resolver("unnamed_keys", unnamed_keys, replace=True)
    OmegaConf.register_new_resolver("launch_record", launch_record, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=schema)
    store.store(group="sae", name="schema", node=SAESchema)
    store.store(group="optim", name="schema", node=OptimSchema)
    store.store(group="schedule", name="schema", node=ScheduleSchema)
    store.store(group="stream", name="schema", node=StreamSchema)
    store.store(group="parallel", name="schema", node=ParallelSchema)
    store.store(group="logger", name="schema", node=LoggerSchema)


def launch_record(mode: RunMode | str | None) -> str | None:
    """Where Hydra notes what a run was launched with: in a sweep alone, since ``train.yaml`` tells all of a run itself.

    A sweep's last grid is found by it; a second run in the folder of a first would overwrite it.
    """
    return ".hydra" if mode in (RunMode.MULTIRUN, RunMode.MULTIRUN.name) else None


def unnamed_keys() -> list[str]:
    """Keys whose values are no part of a sweep folder's name."""
    return [name for name, mark in marks(TrainSchema) if not mark.named]


def sweep_name(overrides: Sequence[str], unnamed: Collection[str]) -> str:
    """Folder of one run of a sweep: ``sae.k=16`` and ``sae.expansion=8`` give ``expansion=8,k=16``.

    A key goes by its last part, unless another that fixes the result ends alike; keys in `unnamed` are left out.
    Items of a list are joined by ``+``. A value that can't be part of a folder's name, such as a path, is a digest of
    it, and so is a name that is too long for a folder.
    """
    given = OverridesParser.create().parse_overrides(sorted(overrides))
    parts = [f"{_key_name(one.key_or_group)}={_value_name(one)}" for one in given if one.key_or_group not in unnamed]
    name = ",".join(parts)
    return (name if len(name.encode()) <= LONGEST_FOLDER else _digest(name)) or "run"


def _key_name(key: str) -> str:
    last = key.rpartition(".")[2]
    others = (name for name, mark in marks(TrainSchema) if mark.identity and name != key)
    return key if any(name.rpartition(".")[2] == last for name in others) else last


def _value_name(override: Override) -> str:
    value = override.value()
    text = value if isinstance(value, str) else (override.input_line or "").partition("=")[2]
    if isinstance(value, list):
        items = [str(item) for item in value]
        text = "+".join(items) if not any(re.search(r"[+,\[{]", item) for item in items) else text
    return text if re.fullmatch(r"[\w.+-]+", text) else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
