"""Llamascopium's mixtures of linear transforms: ``config.json`` + ``sae_weights.safetensors``. Read only.

Tensors: W_E [D, F], b_E [F], b_D [D], of each rank r with c transforms U_matrices.{r} [c, D, r], V_matrices.{r}
[c, r, D]; latents are numbered by ascending rank. With m_i = |U_i V_i| where ``sparsity_include_decoder_norm``, or 1,

    z = (x W_E + b_E) m;   f = activation(z) / m;   y = sum_i f_i U_i V_i x + b_D

on x and y that are scaled to a mean norm of sqrt(D) (``norm_activation`` dataset-wise), or as they are (inference).
A jumprelu's threshold is exp(activation_function.log_jumprelu_threshold). m goes into the encoder and out of U here, so
that latents are m times theirs and transforms have norm 1.
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
from shared.sae.formats.saelens import between
from shared.sae.formats.source import Source
from shared.sae.sites import Sites, SiteWidths

CONFIG, WEIGHTS = "config.json", "sae_weights"
MOST_TRANSFORMS = 1 << 20
NORM = "dataset_average_activation_norm"
ONES = "the molts of Llamascopium"
# How it was trained, and what follows from rank_counts.
HARMLESS = (
    "device", "dtype", "expansion_factor", "jumprelu_threshold_window", "sparsity_threshold_for_triton_spmm_kernel",
    "use_triton_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class RawMoLT:
    """A MoLT as it is read: tensors by this project's names, transforms by ascending rank."""

    ranks: dict[int, int]
    tensors: Mapping[str, Tensor]
    factors: Mapping[int, tuple[Tensor, Tensor]]
    """U [c, D, r] and V [c, r, D] of each rank."""
    activation: str
    k: int | None
    scales: tuple[float, float] | None
    """Of what is read and of what is written; None: raw activations."""
    unit_norms: bool
    provenance: dict[str, Any]

    def to_checkpoint(self, kinds: Mapping[str, type[DictionaryConfig]]) -> tuple[DictionaryConfig, dict[str, Tensor]]:
        """Config and tensors of a dictionary of this project, its latents in this project's order."""
        d = self.tensors["b_dec"].shape[0]
        config: Any = kinds["molt"].of(
            SiteWidths((d,), (d,)),
            {
                "d_latent": sum(self.ranks.values()),
                "ranks": {str(rank): count for rank, count in self.ranks.items()},
                "k": self.k,
                "activation": self.activation,
                "normalisation": "none" if self.scales is None else "scale",
                "pre_bias": False,
                "unit_norm_decoder": self.unit_norms,
            },
            Sites.from_provenance(self.provenance),
        )
        starts, first = {}, 0
        for rank in sorted(self.ranks):
            starts[rank], first = first, first + self.ranks[rank]
        taken, order, maps = dict.fromkeys(starts, 0), [], []
        for rank in config.rank_of_each:  # the next of this rank
            order.append(starts[rank] + taken[rank])
            maps.append(tuple(factor[taken[rank]] for factor in self.factors[rank]))
            taken[rank] += 1
        per_latent = {name: tensor[order] for name, tensor in self.tensors.items() if name != "b_dec"}
        ones, (read, written) = torch.ones(()), self.scales or (1.0, 1.0)
        tensors = {
            **per_latent,
            "U": torch.cat([U_Dr.T for U_Dr, _ in maps]),
            "V": torch.cat([V_rD for _, V_rD in maps]),
            "b_dec": self.tensors["b_dec"],
            **{f"{side}_mean": torch.zeros(d) for side in ("input", "output")},
            **{f"{side}_variance": torch.ones(d) for side in ("input", "output")},
            "input_scale": ones * read,
            "output_scale": ones * written,
        }
        return config, {name: tensor.contiguous() for name, tensor in tensors.items()}

    def at(self, sites: Sites) -> Self:
        """The same at these sites."""
        known = {name: value for name, value in self.provenance.items() if name not in ("hook", "reads", "writes")}
        return replace(self, provenance={**known, **sites.record()})


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / CONFIG
    return (
        path.is_file() and (folder / f"{WEIGHTS}.safetensors").is_file() and read_json(path).get("sae_type") is not None
    )


def read(source: Source) -> RawMoLT:
    """Raises GranaryError for its other kinds, and for batchtopk, which has no form for a token alone there."""
    cfg = source.json(CONFIG, HARMLESS)
    cfg.must_be("sae_type", "molt", what=ONES)
    cfg.must_be("act_fn", "relu", "jumprelu", "topk", what=f"{ONES} whose latents do not depend on other tokens")
    cfg.must_be("norm_activation", "dataset-wise", "inference", what=f"{ONES} normalised dataset-wise or not at all")
    activation, d, ranks = cfg.text("act_fn") or "relu", cfg.whole("d_model"), ranks_of(cfg.mapping("rank_counts"))
    reads, writes = cfg.text("hook_point_in"), cfg.text("hook_point_out")
    f = sum(ranks.values())
    found = source.safetensors(WEIGHTS)
    W_E_DF, b_E_F = found.take({"W_E": (d, f), "b_E": (f,)})
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in sorted(ranks):
        shapes = {f"U_matrices.{rank}": (ranks[rank], d, rank), f"V_matrices.{rank}": (ranks[rank], rank, d)}
        U_cDr, V_crD = found.take(shapes)
        factors[rank] = (U_cDr, V_crD)
    tensors = {"W_enc": W_E_DF.T, "b_enc": b_E_F, "b_dec": torch.zeros(d)}
    if cfg.flag("use_decoder_bias", True):
        tensors["b_dec"] = found.take({"b_D": (d,)})[0]
    if activation == "jumprelu":
        name = "activation_function.log_jumprelu_threshold"
        tensors["activation.log_threshold"] = found.take({name: (f,)})[0]
    includes_norm, k = cfg.flag("sparsity_include_decoder_norm", True), cfg.whole("top_k")
    if includes_norm:
        norms = {rank: norms_of(*both) for rank, both in factors.items()}
        factors = {rank: (U / norms[rank][:, None, None], V) for rank, (U, V) in factors.items()}
        norm_F = torch.cat(list(norms.values()))
        tensors |= {"W_enc": tensors["W_enc"] * norm_F[:, None], "b_enc": b_E_F * norm_F}
    scales = []
    for hook in (reads, writes):
        has_norm = f"{NORM}.{hook}" in found
        norm = found.scalar(f"{NORM}.{hook}") if has_norm else math.nan
        scales.append(math.sqrt(d) / norm if norm > 0 else math.nan)
    is_scaled = cfg.text("norm_activation") != "inference"
    if is_scaled and not all(map(math.isfinite, scales)):
        raise GranaryError(f"{source.folder} does not say the mean norms of {reads} and {writes} ({NORM}.*)")
    return RawMoLT(
        ranks,
        tensors,
        factors,
        activation,
        k if activation == "topk" else None,
        (scales[0], scales[1]) if is_scaled else None,
        includes_norm,
        {"converted_from": "llamascopium", "source": cfg.content, **between(reads, writes)},
    )


def ranks_of(counts: Mapping[str, Any]) -> dict[int, int]:
    """Transforms of each rank; raises GranaryError for what is no such table."""
    are_whole = all(type(count) is int and 0 < count < MOST_TRANSFORMS for count in counts.values())
    if not (counts and are_whole and all(name.isdecimal() for name in counts)):
        raise GranaryError(f"rank_counts={counts!s:.60}: a number of transforms for each rank")
    return {int(name): count for name, count in counts.items()}


def norms_of(U_cDr: Tensor, V_crD: Tensor) -> Tensor:
    """``|U_i V_i|``, [c], by two small products."""
    return ((U_cDr.mT @ U_cDr) * (V_crD @ V_crD.mT)).sum((1, 2)).clamp_min(1e-30).sqrt()
