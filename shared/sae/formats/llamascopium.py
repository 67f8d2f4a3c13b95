"""Llamascopium's mixtures of linear transforms and Lorsas: ``config.json`` + ``sae_weights.safetensors``. Read only.

Tensors of a MoLT: W_E [D, F], b_E [F], b_D [D], of each rank r with c transforms U_matrices.{r} [c, D, r] and
V_matrices.{r} [c, r, D]; latents are numbered by ascending rank. With m_i = |U_i V_i| where
``sparsity_include_decoder_norm``, or 1,

    z = (x W_E + b_E) m;   f = activation(z) / m;   y = sum_i f_i U_i V_i x + b_D

on x and y that are scaled to a mean norm of sqrt(D) (``norm_activation`` dataset-wise), or as they are (inference).
A jumprelu's threshold is exp(activation_function.log_jumprelu_threshold). m goes into the encoder and out of U here, so
that latents are m times theirs and transforms have norm 1. A Lorsa's tensors are in ``llamascopium_lorsa``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shared.basics.documents import read_json
from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.formats.llamascopium_frame import NORM, Frame
from shared.sae.formats.llamascopium_lorsa import RawLorsa, read_lorsa
from shared.sae.formats.saelens import between
from shared.sae.formats.source import Document, Source, Tensors
from shared.sae.sites import Sites

CONFIG, WEIGHTS = "config.json", "sae_weights"
MOST_TRANSFORMS = 1 << 20
ONES = "the molts and lorsas of Llamascopium"
# How it was trained, and what follows from rank_counts.
HARMLESS = (
    "device", "dtype", "expansion_factor", "jumprelu_threshold_window", "sparsity_threshold_for_triton_spmm_kernel",
    "use_triton_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class RawMoLT:
    """A MoLT as it is read: tensors by this project's names, transforms by ascending rank."""

    frame: Frame
    ranks: dict[int, int]
    tensors: Mapping[str, Tensor]
    factors: Mapping[int, tuple[Tensor, Tensor]]
    """U [c, D, r] and V [c, r, D] of each rank."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it is from."""
        return self.frame.provenance

    def to_checkpoint(self, kinds: Mapping[str, type[DictionaryConfig]]) -> tuple[DictionaryConfig, dict[str, Tensor]]:
        """Config and tensors of a dictionary of this project, its latents in this project's order."""
        own = {"d_latent": sum(self.ranks.values()), "ranks": {str(rank): n for rank, n in self.ranks.items()}}
        config: Any = self.frame.config(kinds["molt"], own)
        starts, first = {}, 0
        for rank in sorted(self.ranks):
            starts[rank], first = first, first + self.ranks[rank]
        taken, order, maps = dict.fromkeys(starts, 0), [], []
        for rank in config.rank_of_each:  # the next of this rank
            order.append(starts[rank] + taken[rank])
            maps.append(tuple(factor[taken[rank]] for factor in self.factors[rank]))
            taken[rank] += 1
        tensors = {
            **{name: tensor[order] for name, tensor in self.tensors.items()},
            "U": torch.cat([U_Dr.T for U_Dr, _ in maps]),
            "V": torch.cat([V_rD for _, V_rD in maps]),
            **self.frame.tensors(),
        }
        return config, {name: tensor.contiguous() for name, tensor in tensors.items()}

    def at(self, sites: Sites) -> Self:
        """The same at these sites."""
        return replace(self, frame=self.frame.at(sites))


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / CONFIG
    return (
        path.is_file() and (folder / f"{WEIGHTS}.safetensors").is_file() and read_json(path).get("sae_type") is not None
    )


def read(source: Source) -> RawMoLT | RawLorsa:
    """Raises GranaryError for its other kinds, and for batchtopk, which has no form for a token alone there."""
    cfg = source.json(CONFIG, HARMLESS)
    cfg.must_be("sae_type", "molt", "lorsa", what=ONES)
    cfg.must_be("act_fn", "relu", "jumprelu", "topk", what=f"{ONES} whose latents do not depend on other tokens")
    cfg.must_be("norm_activation", "dataset-wise", "inference", what=f"{ONES} normalised dataset-wise or not at all")
    found = source.safetensors(WEIGHTS)
    frame = frame_of(cfg, found, source)
    return read_lorsa(cfg, found, frame) if cfg.text("sae_type") == "lorsa" else read_molt(cfg, found, frame)


def frame_of(cfg: Document, found: Tensors, source: Source) -> Frame:
    """What both kinds say alike. Raises GranaryError where the scales of normalised activations are missing."""
    reads, writes, d = cfg.text("hook_point_in"), cfg.text("hook_point_out"), cfg.whole("d_model")
    scales = []
    for hook in (reads, writes):
        has_norm = f"{NORM}.{hook}" in found
        norm = found.scalar(f"{NORM}.{hook}") if has_norm else math.nan
        scales.append(math.sqrt(d) / norm if norm > 0 else math.nan)
    is_scaled = cfg.text("norm_activation") != "inference"
    if is_scaled and not all(map(math.isfinite, scales)):
        raise GranaryError(f"{source.folder} does not say the mean norms of {reads} and {writes} ({NORM}.*)")
    activation, k = cfg.text("act_fn") or "relu", cfg.whole("top_k")
    return Frame(
        d=d,
        activation=activation,
        k=k if activation == "topk" else None,
        scales=(scales[0], scales[1]) if is_scaled else None,
        unit_norms=cfg.flag("sparsity_include_decoder_norm", True),
        b_dec=found.take({"b_D": (d,)})[0] if cfg.flag("use_decoder_bias", True) else torch.zeros(d),
        provenance={"converted_from": "llamascopium", "source": cfg.content, **between(reads, writes)},
    )


def read_molt(cfg: Document, found: Tensors, frame: Frame) -> RawMoLT:
    """A mixture of transforms."""
    d, ranks = frame.d, ranks_of(cfg.mapping("rank_counts"))
    f = sum(ranks.values())
    W_E_DF, b_E_F = found.take({"W_E": (d, f), "b_E": (f,)})
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in sorted(ranks):
        shapes = {f"U_matrices.{rank}": (ranks[rank], d, rank), f"V_matrices.{rank}": (ranks[rank], rank, d)}
        U_cDr, V_crD = found.take(shapes)
        factors[rank] = (U_cDr, V_crD)
    tensors = {"W_enc": W_E_DF.T, "b_enc": b_E_F, **frame.thresholds(found, f)}
    if frame.unit_norms:
        norms = {rank: norms_of(*both) for rank, both in factors.items()}
        factors = {rank: (U / norms[rank][:, None, None], V) for rank, (U, V) in factors.items()}
        norm_F = torch.cat(list(norms.values()))
        tensors |= {"W_enc": tensors["W_enc"] * norm_F[:, None], "b_enc": b_E_F * norm_F}
    return RawMoLT(frame, ranks, tensors, factors)


def ranks_of(counts: Mapping[str, Any]) -> dict[int, int]:
    """Transforms of each rank; raises GranaryError for what is no such table."""
    are_whole = all(type(count) is int and 0 < count < MOST_TRANSFORMS for count in counts.values())
    if not (counts and are_whole and all(name.isdecimal() for name in counts)):
        raise GranaryError(f"rank_counts={counts!s:.60}: a number of transforms for each rank")
    return {int(name): count for name, count in counts.items()}


def norms_of(U_cDr: Tensor, V_crD: Tensor) -> Tensor:
    """``|U_i V_i|``, [c], by two small products."""
    return ((U_cDr.mT @ U_cDr) * (V_crD @ V_crD.mT)).sum((1, 2)).clamp_min(1e-30).sqrt()
