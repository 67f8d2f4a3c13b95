"""eval.json: everything that was measured of one dictionary, what it was measured on, and where that came from."""

from dataclasses import dataclass, field

from stage_eval.results.figures import (
    ActivationFigures,
    Breakdown,
    DecoderFigures,
    DiffFigures,
    Downstream,
    Figure,
    LatentFigures,
    Reconstruction,
)
from stage_eval.results.record import OPTIONAL, Json, Record
from stage_eval.results.supervised import SupervisedFigures

FORMAT = "granary-evaluation"
DEFINITIONS = 1
"""Raised when a metric's meaning changes: figures of different definitions can't be compared. See docs/metrics.md."""


@dataclass(frozen=True, kw_only=True)
class SAERecord(Record):
    """Which dictionary this is."""

    name: str
    path: str
    hook: str
    """The site it reads and writes, or ``reads -> writes`` where they differ."""
    config: Json
    reads: list[str] | None = field(default=None, metadata=OPTIONAL)
    """With `writes`, `d_in` and `d_out`: given where it does not read and write one and the same site."""
    writes: list[str] | None = field(default=None, metadata=OPTIONAL)
    d_in: int | None = field(default=None, metadata=OPTIONAL)
    d_out: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def site(self) -> str:
        """The written sites, side by side."""
        return self.hook if self.writes is None else ", ".join(self.writes)

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions that it reads and that it writes."""
        if self.d_in is not None and self.d_out is not None:
            return self.d_in, self.d_out
        return self.config["d_model"], self.config["d_model"]

    @property
    def k(self) -> int | None:
        """Latents per token that the config asks for; None where the activation decides."""
        k: int | None = self.config.get("k")
        return k

    @property
    def activation(self) -> str | None:
        """Name of the activation; Matryoshka SAEs have a name of their own."""
        activation: str | None = self.config.get("activation")
        return "matryoshka" if self.config.get("prefixes") else activation


@dataclass(frozen=True, kw_only=True)
class StoreRecord(Record):
    """The store that was read."""

    url: str
    plan_hash: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class WeightsRecord(Record):
    """The weights that were loaded, and what their training recorded."""

    sha256: str
    provenance: Json


@dataclass(frozen=True, kw_only=True)
class RunProvenance(Record):
    """Where the activations come from; model, corpus, tokenizer and packing are the store's own records."""

    model: Json
    corpus: Json
    tokenizer: Json
    packing: Json
    store: StoreRecord


@dataclass(frozen=True, kw_only=True)
class Provenance(RunProvenance):
    """Where the activations and the dictionary come from."""

    sae: WeightsRecord


@dataclass(frozen=True, kw_only=True)
class Settings(Record):
    """How the evaluation was run."""

    split: str
    contexts: int
    seq_len: int
    model: str | None
    downstream: bool
    splice_bos: bool
    documents: str
    store_dtype: str
    kinds: list[str] | None = field(default=None, metadata=OPTIONAL)
    """The kinds of tokens that were scored, where not all."""


@dataclass(frozen=True, kw_only=True)
class Environment(Record):
    """Software and machine."""

    versions: dict[str, str]
    python: str
    machine: str
    processes: int


@dataclass(frozen=True, kw_only=True)
class TrainingCurve(Record):
    """Tokens seen and FVU of the batch along the training run."""

    tokens: list[Figure]
    fvu: list[Figure]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """The evaluation of one dictionary. The figures before `sae` repeat the headlines of the parts below."""

    format: str
    definitions: int
    created: str
    fvu: Figure
    l0: Figure
    dead_fraction: float
    ce_clean: Figure
    ce_spliced: Figure
    ce_zero: Figure
    ce_mean: Figure
    loss_recovered: Figure
    kl: Figure
    n_tokens: int
    sae: SAERecord
    reconstruction: Reconstruction
    latents: LatentFigures
    decoder: DecoderFigures | None
    downstream: Downstream | None
    breakdown: Breakdown
    activations: ActivationFigures | None
    """Of the site that is written; None where there are several."""
    activations_by_site: dict[str, ActivationFigures] | None = field(default=None, metadata=OPTIONAL)
    differences: DiffFigures | None = field(default=None, metadata=OPTIONAL)
    """Of a crosscoder of two sites of one width."""
    supervised: SupervisedFigures | None = field(default=None, metadata=OPTIONAL)
    """Where they were asked for."""
    training: TrainingCurve | None
    provenance: Provenance
    settings: Settings
    environment: Environment

    @property
    def described(self) -> dict[str, ActivationFigures]:
        """What the activations are like, by written site."""
        if self.activations is not None:
            return {self.sae.site: self.activations}
        return self.activations_by_site or {}
