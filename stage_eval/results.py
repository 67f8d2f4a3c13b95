"""eval.json: everything that was measured, what it was measured on, and where that came from."""

import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.basics.files import write_text
from shared.basics.metrics_file import read_metrics
from shared.basics.versions import software_versions
from shared.sae.folder import describe
from shared.store import HookStatistics, Store
from stage_eval.config import EvalSchema
from stage_eval.measure.activations import ActivationSums, activation_metrics
from stage_eval.measure.data import EvaluationData
from stage_eval.measure.downstream import DownstreamSums, downstream_metrics, loss_breakdown
from stage_eval.measure.reconstruction import breakdown, latent_metrics, reconstruction_metrics
from stage_eval.measure.sums import ReconstructionSums
from stage_eval.sources import Source

FORMAT = "granary-evaluation"
DEFINITIONS = 1
"""Raised when a metric's meaning changes: figures of different definitions can't be compared. See docs/metrics.md."""

SPECTRUM_POINTS = 200
CURVE_POINTS = 400
DOWNSTREAM_HEADLINES = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl")


def assemble(
    source: Source,
    sums: ReconstructionSums,
    described: ActivationSums,
    downstream: DownstreamSums | None,
    decoder: dict[str, Any],
    statistics: HookStatistics,
    data: EvaluationData,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """The evaluation of one SAE as eval.json holds it; `context` is `run_context`'s part."""
    reconstruction = reconstruction_metrics(sums)
    latents = latent_metrics(sums, reconstruction["n_tokens"])
    losses = None
    groups: dict[str, Any] = {}
    for by, grouping in (("position", data.position_groups), ("frequency", data.frequency_groups)):
        groups[by] = {"edges": grouping.edges.tolist(), **breakdown(sums.added[by])}
    if downstream is not None:
        names = (f"sae {source.name}", f"zero {source.hook}", f"mean {source.hook}")
        losses = downstream_metrics(downstream, *names)
        for by in groups:
            groups[by] |= loss_breakdown(downstream, by, names[0])
    headlines = {name: losses[name] if losses is not None else None for name in DOWNSTREAM_HEADLINES}
    report: dict[str, Any] = {
        "format": FORMAT,
        "definitions": DEFINITIONS,
        "created": context["created"],
        "fvu": reconstruction["fvu"],
        "l0": reconstruction["l0"],
        "dead_fraction": latents["dead_fraction"],
        **headlines,
        "n_tokens": reconstruction["n_tokens"],
        "sae": {
            "name": source.name,
            "path": source.path,
            "hook": str(source.hook),
            "config": describe(source.folder).flat(),
        },
        "reconstruction": reconstruction,
        "latents": latents,
        "decoder": decoder,
        "downstream": losses,
        "breakdown": groups,
        "activations": {
            **activation_summary(statistics),
            **activation_metrics(described, data.position_groups.edges.tolist()),
        },
        "training": training_curve(source.folder),
        "provenance": {
            **context["provenance"],
            "sae": {"sha256": source.sha256(), "provenance": source.provenance},
        },
        "settings": context["settings"],
        "environment": context["environment"],
    }
    strict: dict[str, Any] = jsonable(report)
    return strict


def run_context(cfg: EvalSchema, store: Store, data: EvaluationData, model: str | None, ranks: int) -> dict[str, Any]:
    """What all evaluations of one run share: when, on what, with what."""
    recorded = store.plan.provenance
    split = cfg.split.value
    versions = software_versions("torch", "transformers", "numpy")
    python = versions.pop("python")
    return {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "provenance": {
            "model": recorded.get("model", {}),
            "corpus": recorded.get("corpus", {}),
            "tokenizer": recorded.get("tokenizer", {}),
            "packing": recorded.get("packing", {}),
            "store": {"url": store.url, "plan_hash": store.plan.hash(), "digest": store.digest()},
        },
        "settings": {
            "split": split,
            "contexts": len(data.contexts),
            "seq_len": store.seq_len,
            "model": model,
            "downstream": cfg.downstream,
            "splice_bos": cfg.splice_bos,
            "documents": "isolated" if data.isolated else "joined",
            "store_dtype": store.plan.dtype,
        },
        "environment": {
            "versions": versions,
            "python": python,
            "machine": hardware(),
            "processes": ranks,
        },
    }


def hardware() -> str:
    """The GPU's name, or the CPU's architecture and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def activation_summary(statistics: HookStatistics) -> dict[str, Any]:
    """Norms, and the spread and mean of the dimensions in falling order, thinned to a drawable number."""
    std_D = np.sort(np.sqrt(statistics.var))[::-1]
    mean_D = np.sort(np.abs(statistics.mean))[::-1]
    ranks = np.unique(np.geomspace(1, len(std_D), min(SPECTRUM_POINTS, len(std_D))).round().astype(int))
    variance = float(statistics.var.sum())
    return {
        **statistics.summary(),
        "norm_of_mean": float(np.linalg.norm(statistics.mean)),
        "total_variance": variance,
        "variance_in_largest": float(statistics.var.max()) / variance if variance else None,
        "massive_dimensions": [{"dimension": i, "rms_ratio": ratio} for i, ratio in statistics.outlier_dimensions()],
        "store_norm_by_position": [
            {
                "first": group.first,
                "last": group.last,
                "tokens": group.count,
                **{f"p{percent}": value for percent, value in group.percentiles.items()},
            }
            for group in statistics.norms_by_position
        ],
        "spectrum": {
            "rank": ranks.tolist(),
            "std": std_D[ranks - 1].tolist(),
            "abs_mean": mean_D[ranks - 1].tolist(),
        },
    }


def training_curve(folder: Path) -> dict[str, list[float]] | None:
    """Tokens and FVU along the training run, where its metrics.jsonl lies beside the SAE; else None."""
    points: dict[float, float] = {}
    for record in read_metrics(folder):
        if "tokens" in record and "fvu" in record:
            points[record["tokens"]] = record["fvu"]  # a resumed run logs some steps twice
    ordered = sorted(points.items())
    if len(ordered) < 2:
        return None
    step = max(1, len(ordered) // CURVE_POINTS)
    thinned = ordered[::-step][::-1]
    return {"tokens": [tokens for tokens, _ in thinned], "fvu": [fvu for _, fvu in thinned]}


def jsonable(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any) -> None:
    """Indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
