"""From what the passes summed to the evaluation of one dictionary."""

import os
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch

from shared.basics.metrics_file import read_columns
from shared.basics.versions import software_versions
from shared.sae.sites import slices
from stage_eval.config import EvalSchema
from stage_eval.measure.activations import ActivationSums, activation_figures
from stage_eval.measure.breakdown import Grouping
from stage_eval.measure.diffing import DiffSums, diff_figures
from stage_eval.measure.downstream import DownstreamSums, downstream_figures, loss_breakdown
from stage_eval.measure.kinds import kind_figures
from stage_eval.measure.passes import ablated
from stage_eval.measure.reconstruction import fvu_breakdown, latent_figures, reconstruction_figures
from stage_eval.measure.session import Session
from stage_eval.measure.sums import ReconstructionSums
from stage_eval.results.evaluation import (
    DEFINITIONS,
    FORMAT,
    Environment,
    Evaluation,
    Provenance,
    RunProvenance,
    SAERecord,
    Settings,
    StoreRecord,
    TrainingCurve,
    WeightsRecord,
)
from stage_eval.results.figures import Breakdown, DecoderFigures, GroupFigures
from stage_eval.results.supervised import SupervisedFigures
from stage_eval.sae_folders import SAEFolder

CURVE_POINTS = 400
DOWNSTREAM_HEADLINES = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl")


@dataclass(frozen=True)
class RunFacts:
    """What all evaluations of one run share: when, on what, with what."""

    created: str
    provenance: RunProvenance
    settings: Settings
    environment: Environment

    @classmethod
    def of(cls, cfg: EvalSchema, session: Session, model: str | None) -> Self:
        """The facts of this run; `model` is the path of the language model, None where it is not run."""
        store, data = session.store, session.data
        recorded = store.plan.provenance
        versions = software_versions("torch", "transformers", "numpy")
        python = versions.pop("python")
        return cls(
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            provenance=RunProvenance(
                model=recorded.get("model", {}),
                corpus=recorded.get("corpus", {}),
                tokenizer=recorded.get("tokenizer", {}),
                packing=recorded.get("packing", {}),
                store=StoreRecord(url=store.url, plan_hash=store.plan.hash(), digest=store.digest()),
            ),
            settings=Settings(
                split=cfg.split.value,
                contexts=len(data.contexts),
                seq_len=store.seq_len,
                model=model,
                downstream=cfg.downstream,
                splice_bos=cfg.splice_bos,
                documents=data.packing,
                store_dtype=store.plan.dtype,
                kinds=None if cfg.kinds is None else [kind.value for kind in cfg.kinds],
            ),
            environment=Environment(
                versions=versions,
                python=python,
                machine=hardware(),
                processes=session.world.size,
            ),
        )


@dataclass(frozen=True)
class Measured:
    """What the passes summed for one dictionary; `described` and `losses` are shared with the others of its pass."""

    folder: SAEFolder
    reconstruction: ReconstructionSums
    described: dict[str, ActivationSums]
    """By written site."""
    losses: DownstreamSums | None
    decoder: DecoderFigures | None
    differences: DiffSums | None = None
    supervised: SupervisedFigures | None = None


def assemble(measured: Measured, session: Session, facts: RunFacts) -> Evaluation:
    """The evaluation of one dictionary."""
    folder, sums = measured.folder, measured.reconstruction
    written = folder.sites.writes
    reconstruction = reconstruction_figures(sums, slices(written, folder.widths.writes))
    latents = latent_figures(sums, reconstruction.n_tokens)
    downstream = None
    if measured.losses is not None:
        downstream = downstream_figures(
            measured.losses, folder.spliced, ablated("zero", written), ablated("mean", written)
        )
    described = {
        site: activation_figures(measured.described[site], session.statistics[site], session.data.position_groups)
        for site in written
    }
    is_one = len(described) == 1
    return Evaluation(
        format=FORMAT,
        definitions=DEFINITIONS,
        created=facts.created,
        fvu=reconstruction.fvu,
        l0=reconstruction.l0,
        dead_fraction=latents.dead_fraction,
        **{name: getattr(downstream, name, None) for name in DOWNSTREAM_HEADLINES},
        n_tokens=reconstruction.n_tokens,
        sae=describe(folder),
        reconstruction=reconstruction,
        latents=latents,
        decoder=measured.decoder,
        downstream=downstream,
        breakdown=Breakdown(
            position=groups(measured, "position", session.data.position_groups),
            frequency=groups(measured, "frequency", session.data.frequency_groups),
            kind=kind_figures(sums),
        ),
        activations=next(iter(described.values())) if is_one else None,
        activations_by_site=None if is_one else described,
        differences=None
        if measured.differences is None
        else diff_figures(measured.differences, sums.added["firings_F"] > 0, written),
        supervised=measured.supervised,
        training=training_curve(folder.folder),
        provenance=Provenance(
            **vars(facts.provenance),
            sae=WeightsRecord(sha256=folder.sha256(), provenance=folder.description.provenance),
        ),
        settings=facts.settings,
        environment=facts.environment,
    )


def describe(folder: SAEFolder) -> SAERecord:
    """Which dictionary this is; sites and widths are spelled out where they are not one and the same."""
    sites, widths = folder.sites, folder.widths
    record = SAERecord(name=folder.name, path=folder.path, hook=str(sites), config=folder.description.flat())
    if sites.is_autoencoder and len(sites.reads) == 1:
        return record
    return replace(record, reads=list(sites.reads), writes=list(sites.writes), d_in=widths.d_in, d_out=widths.d_out)


def groups(measured: Measured, by: str, grouping: Grouping) -> GroupFigures:
    """Figures of the groups of `by` (position or frequency); those of the losses where the model was run."""
    edges = grouping.edges.tolist()
    tokens, fvu = fvu_breakdown(measured.reconstruction.added[by])
    if measured.losses is None:
        return GroupFigures(edges=edges, tokens=tokens, fvu=fvu)
    losses = loss_breakdown(measured.losses, by, measured.folder.spliced)
    return GroupFigures(
        edges=edges,
        tokens=tokens,
        fvu=fvu,
        predictions=losses.predictions,
        ce_clean=losses.ce_clean,
        ce_increase=losses.ce_increase,
    )


def hardware() -> str:
    """The GPU's name, or the CPU's architecture and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def training_curve(folder: Path) -> TrainingCurve | None:
    """Tokens and FVU along the training run, where its metrics.jsonl lies beside the SAE; else None."""
    columns = read_columns(folder, ["tokens", "fvu"])
    ordered = sorted(dict(zip(columns["tokens"], columns["fvu"], strict=True)).items())  # some are logged twice
    if len(ordered) < 2:
        return None
    step = max(1, len(ordered) // CURVE_POINTS)
    thinned = ordered[::-step][::-1]
    return TrainingCurve(tokens=[int(tokens) for tokens, _ in thinned], fvu=[fvu for _, fvu in thinned])
