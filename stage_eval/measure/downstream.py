"""What the language model loses when an activation is replaced: cross-entropy, loss recovered, KL to the clean model.

A `Condition` replaces the activations of one or several sites at the same set of positions; clean replaces nothing. The
passes of a batch share their tokens, positions and labels, so all differences come from the replacement alone.

Legend: B contexts in a batch, T positions of a context, N scored (predicting) positions, M replaced positions,
D width of a site, C evaluated contexts, Q conditions, G groups of a breakdown.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.kernels import add_at
from shared.lm import packed_inputs, splice_through
from shared.lm.next_token import VocabularyHead, score_next_tokens
from shared.lm.packed import document_length
from shared.lm.replay import Kept, is_exact, keeping, layers_before, replaying
from shared.lm.targets import point_of
from shared.sae.contexts import Contexts, Given, as_attended
from shared.sae.sites import Sites
from stage_eval.measure.confidence import Estimate, ratio_of_sums
from stage_eval.measure.sums import Rows, Sums
from stage_eval.results.figures import Downstream, JointDownstream

Replacement = Callable[[Given], Tensor]
"""Float32 activations of the read sites, [M, d_in], or whole contexts in which M positions count, to what takes the
place of the written ones, [M, d_out]."""

CLEAN = "clean"


@dataclass(frozen=True)
class Splice:
    """One replacement and its sites."""

    sites: Sites
    replacement: Replacement
    widths: tuple[int, ...] | None = None
    """Of the written sites; None: all are equally wide."""
    read_widths: tuple[int, ...] | None = None
    """Of the read sites, where what is written at a site depends on no later one; None elsewhere."""


@dataclass(frozen=True)
class Condition:
    """A named way to run the model."""

    name: str
    splices: tuple[Splice, ...] = ()

    @property
    def depth(self) -> int:
        """How many of the model's first layers run as in a clean forward, whatever is read of them or replaced."""
        sites = chain.from_iterable((*splice.sites.reads, *splice.sites.writes) for splice in self.splices)
        return layers_before(map(point_of, sites))


@dataclass(frozen=True)
class Batch:
    """Contexts as the model sees them."""

    tokens_BT: Tensor
    """int64"""
    segments_BT: Tensor
    """int64: document of each position."""
    packing: str
    """As the harvest ran the contexts: ``isolated``, ``joined``, or ``separate``."""
    replaced_BT: Tensor
    """bool: positions whose activation a condition replaces."""
    scored_BT: Tensor
    """bool: positions whose prediction of the next token counts; the last column is false."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = (tensor.to(device) for tensor in (self.tokens_BT, self.segments_BT, self.replaced_BT, self.scored_BT))
        tokens_BT, segments_BT, replaced_BT, scored_BT = moved
        return Batch(tokens_BT, segments_BT, self.packing, replaced_BT, scored_BT)

    @property
    def documents(self) -> Tensor:
        """int64 [B, T]: what attends to itself alone, documents or, where they see each other, all of a context."""
        return as_attended(self.segments_BT, isolated=self.packing != "joined")

    def forwards(self) -> "list[Batch]":
        """What goes through the model at once: all of it, or each document alone and at its own length.

        In the order of their contexts, so rows of scored positions come in the order of the whole batch.
        """
        if self.packing != "separate":
            return [self]
        lengths = [document_length(segments_T) for segments_T in self.segments_BT]
        tensors = (self.tokens_BT, self.segments_BT, self.replaced_BT, self.scored_BT)
        found = []
        for row, length in enumerate(lengths):
            tokens_1L, segments_1L, replaced_1L, scored_1L = (tensor[row : row + 1, :length] for tensor in tensors)
            found.append(Batch(tokens_1L, segments_1L, self.packing, replaced_1L, scored_1L))
        return found


def scored_positions(mask_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """Positions t whose next token is a fair label: unmasked (no BOS, padding, special) and of the same document."""
    scored_BT = torch.zeros_like(mask_BT)
    scored_BT[:, :-1] = mask_BT[:, 1:] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    return scored_BT


def zero_replacement(x: Given) -> Tensor:
    """Zero ablation."""
    assert isinstance(x, Tensor)
    return torch.zeros_like(x)


def mean_replacement(mean_D: Tensor) -> Replacement:
    """Mean ablation: every position gets the training mean."""

    def replace(x: Given) -> Tensor:
        assert isinstance(x, Tensor)
        return mean_D.to(x).expand_as(x)

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
        add_at(self.added["tokens_C"], rows.context_N, ones_N)
        for name, scores_QN in (("cross_entropy_CQ", ce_QN), ("kl_CQ", kl_QN), ("agrees_CQ", agrees_QN)):
            add_at(self.added[name], rows.context_N, scores_QN.T)
        for name, group_N in (("position", rows.position_N), ("frequency", rows.frequency_N)):
            add_at(self.added[f"{name}_tokens_G"], group_N, ones_N)
            add_at(self.added[f"{name}_GQ"], group_N, ce_QN.T)


@torch.inference_mode()
def run_conditions(
    model: PreTrainedModel,
    head: VocabularyHead,
    batch: Batch,
    conditions: Sequence[Condition],
    sums: DownstreamSums,
    rows: Rows,
    depths: Collection[int],
) -> None:
    """Run the batch under every condition and add its scores; `rows` describes the scored positions in row order.

    The first condition is clean. What it makes of the first layers, as many as one of `depths` says, is what other
    conditions that leave these alone begin with.
    """
    trunk = Trunk(model, batch, depths)
    hidden_QND = [trunk.final_hidden(condition) for condition in conditions]
    labels_BT = batch.tokens_BT.roll(-1, dims=1)
    scores = score_next_tokens(head, hidden_QND, labels_BT[batch.scored_BT])
    sums.add(scores.cross_entropy_QN, scores.kl_QN, scores.agrees_QN, rows)


class Trunk:
    """Forwards of one batch through the layers, up to the vocabulary; those that differ late begin late."""

    def __init__(self, model: PreTrainedModel, batch: Batch, depths: Collection[int] = ()) -> None:
        self.model, self.depths = model, depths
        self.parts: list[tuple[Batch, Kept]] = [(part, {}) for part in batch.forwards()]

    def final_hidden(self, condition: Condition) -> Tensor:
        """Hidden states [N, D] after the final norm at the scored positions, the condition's replacements in place."""
        return torch.cat([self._forward(condition, part, kept) for part, kept in self.parts])

    def _forward(self, condition: Condition, part: Batch, kept: Kept) -> Tensor:
        depth = condition.depth
        with ExitStack() as stack:
            for splice in condition.splices:
                stack.enter_context(spliced(self.model, splice, part))
            if not condition.splices:
                stack.enter_context(keeping(self.model, self.depths, kept))
            elif depth in kept:
                stack.enter_context(replaying(self.model, depth, kept[depth]))
            inputs = packed_inputs(self.model, part.tokens_BT, part.segments_BT, isolated=part.packing == "isolated")
            output = self.model.base_model(**inputs)
        hidden_ND: Tensor = output.last_hidden_state[part.scored_BT]
        return hidden_ND


def spliced(model: PreTrainedModel, splice: Splice, batch: Batch) -> AbstractContextManager[None]:
    """A context in which the model goes on from the replacement at the positions that `batch` replaces."""
    replaced_BT = batch.replaced_BT

    def replace(x_BTD: Tensor) -> Tensor:
        x: Given = x_BTD[replaced_BT].float()
        if splice.sites.unit == "sequence":
            x = Contexts.of(x_BTD.float(), batch.documents, replaced_BT)
        y_MD = splice.replacement(x)
        y_BTD = y_MD.new_zeros(*replaced_BT.shape, y_MD.shape[-1])
        y_BTD[replaced_BT] = y_MD
        return y_BTD

    reads, writes = (list(map(point_of, names)) for names in (splice.sites.reads, splice.sites.writes))
    return splice_through(
        model, reads, writes, replace, where=replaced_BT, widths=splice.widths, read_widths=splice.read_widths
    )


def check_splices(model: PreTrainedModel, conditions: Sequence[Condition]) -> set[int]:
    """Run every condition on one token, so that a splice which can't work is told before any long work.

    Returns behind how many layers a forward may begin, for it gave the same there as a whole one, bit for bit. Raises
    GranaryError for a site that the model lacks, that is read after it was needed, or that does not run.
    """
    here_11 = torch.ones(1, 1, dtype=torch.bool, device=model.device)
    probe_11 = here_11.long()
    batch = Batch(probe_11, torch.zeros_like(probe_11), packing="joined", replaced_BT=here_11, scored_BT=here_11)
    exact = {condition.depth for condition in conditions} - {0}
    whole, short = Trunk(model, batch), Trunk(model, batch, exact)
    with torch.inference_mode():
        short.final_hidden(Condition(CLEAN))
        for condition in conditions:
            try:
                expected = whole.final_hidden(condition)
            except GranaryError as error:
                raise GranaryError(f"{error}; downstream=false scores the reconstruction alone") from None
            if condition.depth in exact and not is_exact(partial(short.final_hidden, condition), expected):
                exact.discard(condition.depth)
    return exact


def downstream_figures(sums: DownstreamSums, spliced: str, zero: str, mean: str) -> Downstream:
    """CE, KL and loss recovered of the condition `spliced` against its zero- and mean-ablation.

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
    return Downstream(
        **{name: estimate.value for name, estimate in estimates.items()},
        n_predictions=int(tokens_C.sum()),
        confidence95={name: estimate.interval for name, estimate in estimates.items()},
    )


def joint_figures(sums: DownstreamSums, hooks: Sequence[str]) -> JointDownstream:
    """The losses with the dictionaries at `hooks` all spliced in at once, against ablating all they write."""
    figures = downstream_figures(sums, "sae joint", "zero joint", "mean joint")
    return JointDownstream(**vars(figures), hooks=list(hooks))


@dataclass(frozen=True)
class LossBreakdown:
    """Predictions, clean cross-entropy and its increase, for every group; None where a group has no prediction."""

    predictions: list[int]
    ce_clean: list[float | None]
    ce_increase: list[float | None]


def loss_breakdown(sums: DownstreamSums, by: str, spliced: str) -> LossBreakdown:
    """The losses of the condition `spliced` in every group of `by` (position or frequency)."""
    column = {name: index for index, name in enumerate(sums.conditions)}
    tokens_G = sums.added[f"{by}_tokens_G"].numpy()
    clean_G = sums.added[f"{by}_GQ"][:, column[CLEAN]].numpy()
    increase_G = sums.added[f"{by}_GQ"][:, column[spliced]].numpy() - clean_G

    def mean(total_G: npt.NDArray[np.float64]) -> list[float | None]:
        return [float(value / count) if count else None for value, count in zip(total_G, tokens_G, strict=True)]

    return LossBreakdown(tokens_G.astype(np.int64).tolist(), mean(clean_G), mean(increase_G))
