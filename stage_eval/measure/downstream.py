"""What the language model loses when an activation is replaced: cross-entropy, loss recovered, KL to the clean model.

A `Condition` replaces the activation of one or several hooks at the same set of positions; clean replaces nothing. The
passes of a batch share their tokens, positions and labels, so all differences come from the replacement alone.

Legend: B contexts in a batch, T positions of a context, N scored (predicting) positions, M replaced positions,
D d_model, C evaluated contexts, Q conditions, G groups of a breakdown.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.lm import packed_inputs, splice
from shared.lm.hookpoint import HookPoint
from stage_eval.measure.confidence import Estimate, ratio_of_sums
from stage_eval.measure.sums import Rows, Sums
from stage_eval.measure.vocabulary import VocabularyHead, score_next_tokens

Replacement = Callable[[Tensor], Tensor]
"""[M, D] float32 activations to what takes their place, [M, D]."""

CLEAN = "clean"


@dataclass(frozen=True)
class Condition:
    """A named way to run the model."""

    name: str
    replacements: dict[HookPoint, Replacement] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Contexts as the model sees them."""

    tokens_BT: Tensor
    """int64"""
    segments_BT: Tensor
    """int64: document of each position."""
    isolated: bool
    """Documents do not see one another."""
    replaced_BT: Tensor
    """bool: positions whose activation a condition replaces."""
    scored_BT: Tensor
    """bool: positions whose prediction of the next token counts; the last column is false."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = (tensor.to(device) for tensor in (self.tokens_BT, self.segments_BT, self.replaced_BT, self.scored_BT))
        tokens_BT, segments_BT, replaced_BT, scored_BT = moved
        return Batch(tokens_BT, segments_BT, self.isolated, replaced_BT, scored_BT)


def scored_positions(mask_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """Positions t whose next token is a fair label: unmasked (no BOS, padding, special) and of the same document."""
    scored_BT = torch.zeros_like(mask_BT)
    scored_BT[:, :-1] = mask_BT[:, 1:] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    return scored_BT


def zero_replacement(x_MD: Tensor) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(x_MD)


def mean_replacement(mean_D: Tensor) -> Replacement:
    """Mean ablation: every position gets the training mean."""

    def replace(x_MD: Tensor) -> Tensor:
        return mean_D.to(x_MD).expand_as(x_MD)

    return replace


class DownstreamSums(Sums):
    """Sums over scored positions, for Q conditions of which the first is clean."""

    def __init__(
        self, conditions: Sequence[str], *, contexts: int, positions: int, frequencies: int, device: torch.device
    ) -> None:
        super().__init__()
        self.conditions = list(conditions)
        count = len(self.conditions)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.added = {
            "tokens_C": zeros(contexts),
            "cross_entropy_CQ": zeros(contexts, count),
            "kl_CQ": zeros(contexts, count),
            "agrees_CQ": zeros(contexts, count),
            "position_tokens_G": zeros(positions),
            "position_GQ": zeros(positions, count),
            "frequency_tokens_G": zeros(frequencies),
            "frequency_GQ": zeros(frequencies, count),
        }

    def add(self, ce_QN: Tensor, kl_QN: Tensor, agrees_QN: Tensor, rows: Rows) -> None:
        """Add N scored positions; `rows.frequency_N` groups by label, `rows.position_N` by where it is predicted."""
        ones_N = torch.ones_like(ce_QN[0])
        self.added["tokens_C"].index_add_(0, rows.context_N, ones_N)
        for name, scores_QN in (("cross_entropy_CQ", ce_QN), ("kl_CQ", kl_QN), ("agrees_CQ", agrees_QN)):
            self.added[name].index_add_(0, rows.context_N, scores_QN.T)
        for name, group_N in (("position", rows.position_N), ("frequency", rows.frequency_N)):
            self.added[f"{name}_tokens_G"].index_add_(0, group_N, ones_N)
            self.added[f"{name}_GQ"].index_add_(0, group_N, ce_QN.T)


@torch.inference_mode()
def run_conditions(
    model: PreTrainedModel,
    head: VocabularyHead,
    batch: Batch,
    conditions: Sequence[Condition],
    sums: DownstreamSums,
    rows: Rows,
) -> None:
    """Run the batch under every condition and add its scores; `rows` describes the scored positions in row order."""
    hidden_QND = [final_hidden(model, batch, condition) for condition in conditions]
    labels_BT = batch.tokens_BT.roll(-1, dims=1)
    scores = score_next_tokens(head, hidden_QND, labels_BT[batch.scored_BT])
    sums.add(scores.cross_entropy_QN, scores.kl_QN, scores.agrees_QN, rows)


def final_hidden(model: PreTrainedModel, batch: Batch, condition: Condition) -> Tensor:
    """Hidden states [N, D] after the final norm at the scored positions, the condition's replacements in place."""
    with ExitStack() as stack:
        for hook, replacement in condition.replacements.items():

            def replace(x_BTD: Tensor, replacement: Replacement = replacement) -> Tensor:
                replaced_BTD = x_BTD.clone()
                replaced_BTD[batch.replaced_BT] = replacement(x_BTD[batch.replaced_BT].float()).to(x_BTD.dtype)
                return replaced_BTD

            stack.enter_context(splice(model, hook, replace))
        inputs = packed_inputs(model, batch.tokens_BT, batch.segments_BT, isolated=batch.isolated)
        output = model.base_model(**inputs)
    hidden_ND: Tensor = output.last_hidden_state[batch.scored_BT]
    return hidden_ND


def downstream_metrics(sums: DownstreamSums, spliced: str, zero: str, mean: str) -> dict[str, Any]:
    """CE, KL and loss recovered of the condition `spliced` against its zero- and mean-ablation, JSON-ready.

    loss_recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean), a ratio of sums over the same tokens.
    """
    column = {name: index for index, name in enumerate(sums.conditions)}
    tokens_C = sums.added["tokens_C"].numpy()
    ce = {name: sums.added["cross_entropy_CQ"][:, column[name]].numpy() for name in (CLEAN, spliced, zero, mean)}
    kl = {name: sums.added["kl_CQ"][:, column[name]].numpy() for name in (spliced, zero, mean)}
    agrees_C = sums.added["agrees_CQ"][:, column[spliced]].numpy()
    estimates: dict[str, Estimate] = {
        "ce_clean": ratio_of_sums(ce[CLEAN], tokens_C),
        "ce_spliced": ratio_of_sums(ce[spliced], tokens_C),
        "ce_zero": ratio_of_sums(ce[zero], tokens_C),
        "ce_mean": ratio_of_sums(ce[mean], tokens_C),
        "ce_increase": ratio_of_sums(ce[spliced] - ce[CLEAN], tokens_C),
        "loss_recovered": ratio_of_sums(ce[zero] - ce[spliced], ce[zero] - ce[CLEAN]),
        "loss_recovered_over_mean": ratio_of_sums(ce[mean] - ce[spliced], ce[mean] - ce[CLEAN]),
        "kl": ratio_of_sums(kl[spliced], tokens_C),
        "kl_zero": ratio_of_sums(kl[zero], tokens_C),
        "kl_mean": ratio_of_sums(kl[mean], tokens_C),
        "kl_recovered": ratio_of_sums(kl[zero] - kl[spliced], kl[zero]),
        "top1_agreement": ratio_of_sums(agrees_C, tokens_C),
    }
    metrics: dict[str, Any] = {name: estimate.value for name, estimate in estimates.items()}
    metrics["n_predictions"] = int(tokens_C.sum())
    metrics["confidence95"] = {name: estimate.interval for name, estimate in estimates.items()}
    return metrics


def loss_breakdown(sums: DownstreamSums, by: str, spliced: str) -> dict[str, list[Any]]:
    """Predictions, clean CE and CE increase in every group of `by` (position or frequency)."""
    column = {name: index for index, name in enumerate(sums.conditions)}
    tokens_G = sums.added[f"{by}_tokens_G"].numpy()
    clean_G = sums.added[f"{by}_GQ"][:, column[CLEAN]].numpy()
    increase_G = sums.added[f"{by}_GQ"][:, column[spliced]].numpy() - clean_G

    def mean(total_G: np.ndarray[Any, Any]) -> list[float | None]:
        return [float(value / count) if count else None for value, count in zip(total_G, tokens_G, strict=True)]

    return {
        "predictions": tokens_G.astype(np.int64).tolist(),
        "ce_clean": mean(clean_G),
        "ce_increase": mean(increase_G),
    }
