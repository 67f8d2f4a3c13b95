"""What each activation makes of learning: its losses, what they must know of the batch, and its thresholds.

Shapes: N rows, D_in width of what is read, F latents held here, K picks per row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.sae.activations import BatchTopK, Gated, JumpReLU, TopK
from shared.sae.contexts import Given
from shared.sae.learn import batch_facts
from shared.sae.learn.batch_facts import Reduce, SelectionMemory
from shared.sae.learn.dense_step import DenseForm, dense_losses
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.losses import saturated
from shared.sae.learn.sparse_step import Selection, sparse_losses
from shared.sae.learn.straight_through import jump_relu, step
from shared.sae.learn.terms import GroupTerms, LossTerms


class Rule:
    """The common part, for an activation that trains in the form of its class."""

    scale_search: str = "closed_form"
    """How ``encoder_init=scaled`` finds the encoder's scale: closed_form, or grid where thresholds break that."""
    overshoot = 1.0
    """Times the scale that fits best."""
    looks_at_all = False
    """Whether the start looks at the whole sample: k of F latents fire, and not half of them."""

    def __init__(self, terms: LossTerms, own: GroupTerms) -> None:
        """`own`: the group whose latents it is about; the losses are of a dictionary that has no other."""
        self.terms, self.own = terms, own

    def losses(self, x: Given, y: Tensor, inputs: StepInputs) -> Losses:
        """See ``Objective.losses``."""
        raise NotImplementedError

    def needs_facts(self, *, cut: bool) -> bool:
        """See ``Objective.needs_facts``."""
        return False

    def facts(
        self, centred: Sequence[Given], num_tokens: int, k: int | None, reduce_all: Reduce, reduce_rows: Reduce
    ) -> list[BatchFacts]:
        """Collect those of the micro-batches' encoder inputs; see ``Objective.facts``."""
        raise NotImplementedError

    def after_step(self, facts: BatchFacts | None) -> None:
        """What the activation learns beside gradients, from any one of the step's facts, and what its group holds."""
        self.own.group.after_step()

    def start(self) -> None:
        """Set the activation's own parameters to where learning begins."""

    def fit_to_sample(self, centred: Given) -> None:
        """Set what follows from the encoder and a sample of its inputs, [M, D_in] or whole contexts."""


class TopKRule(Rule):
    """k latents of each token."""

    # TopK and BatchTopK begin longer than fits best: fewer latents die, at the same FVU (docs/log.md, 2026-11-24).
    overshoot = 1.25
    looks_at_all = True

    def losses(self, x: Given, y: Tensor, inputs: StepInputs) -> Losses:
        """Compute them by the sparse step."""
        return sparse_losses(self.terms, x, y, inputs, self.select)

    def select(self, centred: Given, inputs: StepInputs) -> Selection:
        """Select in descending order: the first k columns are the main ones."""
        own, learning, activation = self.own, self.terms.learning, self.own.group.activation
        assert isinstance(activation, TopK)
        k = activation.k if inputs.k is None else inputs.k
        width = min(learning.multi_topk_factor * k, own.d_latent) if learning.multi_topk_weight > 0 else k
        encoder = own.group.encoder()
        values_NK, indices_NK = activation.select(encoder, centred, width)
        values_NK = encoder.unweighted(values_NK, indices_NK)
        if width == k:
            return Selection(values_NK, indices_NK, indices_NK, None)
        return Selection(values_NK, indices_NK, indices_NK[:, :k], indices_NK[:, k:])


class BatchTopKRule(Rule):
    """k latents per token on average over the batch."""

    overshoot = 1.25

    def __init__(self, terms: LossTerms, own: GroupTerms) -> None:
        super().__init__(terms, own)
        self.memory = SelectionMemory()

    @property
    def activation(self) -> BatchTopK:
        """The dictionary's."""
        activation = self.own.group.activation
        assert isinstance(activation, BatchTopK)
        return activation

    def losses(self, x: Given, y: Tensor, inputs: StepInputs) -> Losses:
        """Compute them by the sparse step; rows without facts are the batch."""
        if inputs.facts is None:
            with torch.no_grad():
                centred = self.terms.prepare(x, y)[0]
                (facts,) = self.facts([centred], len(x), inputs.k, batch_facts.alone, batch_facts.alone)
            inputs = inputs.with_facts(facts)
        return sparse_losses(self.terms, x, y, inputs, self.select)

    def select(self, centred: Given, inputs: StepInputs) -> Selection:
        """Every value from the batch's least on: at a tie all are kept, so that no row or rank has precedence."""
        facts = inputs.facts
        assert facts is not None
        values_NM, indices_NM = facts.values, facts.indices
        assert values_NM is not None
        assert indices_NM is not None
        assert facts.least is not None
        assert facts.least_multi is not None
        main = indices_NM.masked_fill(values_NM < facts.least, -1)
        extra = None
        if facts.least_multi is not facts.least:
            extra = indices_NM.masked_fill((values_NM < facts.least_multi) | (main >= 0), -1)
            indices_NM = torch.maximum(main, extra)
        else:
            indices_NM = main
        values_NM = self.own.group.encoder().unweighted(values_NM, indices_NM)
        return Selection(values_NM.masked_fill(indices_NM < 0, 0), indices_NM, main, extra)

    def needs_facts(self, *, cut: bool) -> bool:
        """Whether facts are needed: they are, as which pairs are kept is the whole batch's choice."""
        return True

    def facts(
        self, centred: Sequence[Given], num_tokens: int, k: int | None, reduce_all: Reduce, reduce_rows: Reduce
    ) -> list[BatchFacts]:
        """The candidates of each micro-batch, and the least value that the batch keeps."""
        k, d_latent = self.own.k if k is None else k, self.own.d_latent
        factor = self.terms.learning.multi_topk_factor if self.terms.learning.multi_topk_weight > 0 else 1
        (facts,) = batch_facts.select_over_batch(
            [self.own.group.encoder()],
            [centred],
            wanted=num_tokens * min(k, d_latent),
            most=num_tokens * min(k * factor, d_latent),
            memory=self.memory,
            first_guess=self.activation.threshold,
            reduce=reduce_all,
        )
        return facts

    @torch.no_grad()
    def after_step(self, facts: BatchFacts | None) -> None:
        """Move the inference threshold towards the least value that the batch kept."""
        super().after_step(facts)
        if facts is not None and facts.least is not None:
            threshold = self.activation.threshold
            threshold.lerp_(facts.least.to(threshold), 1 - self.terms.learning.threshold_decay)

    def fit_to_sample(self, centred: Given) -> None:
        """The threshold that keeps k latents per token of the sample."""
        encoder, k = self.own.group.encoder(), self.own.k
        kept = encoder.largest_of_batch(centred, min(k, self.own.group.num_latents))
        self.activation.threshold.copy_(self.terms.shard.least_of_largest(*kept, count=k * len(centred)))


class DenseRule(Rule):
    """Activations whose L0 is free."""

    def losses(self, x: Given, y: Tensor, inputs: StepInputs) -> Losses:
        """Compute them by dense products."""
        return dense_losses(self.terms, x, y, inputs, self.form())

    def form(self) -> DenseForm:
        """How the dense step computes this activation."""
        raise NotImplementedError

    def needs_facts(self, *, cut: bool) -> bool:
        """Whether facts are needed: for tanh_quad, whose frequencies are the whole batch's."""
        return self.terms.learning.penalty == "tanh_quad" and cut

    def facts(
        self, centred: Sequence[Given], num_tokens: int, k: int | None, reduce_all: Reduce, reduce_rows: Reduce
    ) -> list[BatchFacts]:
        """The batch's mean of tanh(c f) per latent."""
        group, activation = self.own.group, self.form().activation

        def strength(z_NF: Tensor) -> Tensor:
            return saturated(activation(z_NF), self.terms.learning, group.decoder_norm())

        return batch_facts.frequencies(group, centred, num_tokens, strength, reduce_rows)


class ReLURule(DenseRule):
    """Plain autograd."""

    def form(self) -> DenseForm:
        """max(z, 0)."""
        return DenseForm(activation=torch.relu)


class JumpReLURule(DenseRule):
    """Straight-through gradients teach the thresholds."""

    scale_search = "grid"

    @property
    def log_threshold(self) -> Tensor:
        """The dictionary's."""
        activation = self.own.group.activation
        assert isinstance(activation, JumpReLU)
        return activation.log_threshold

    def form(self) -> DenseForm:
        """z above a threshold per latent, whose L0 has a gradient too."""
        bandwidth = self.terms.learning.bandwidth
        return DenseForm(
            activation=lambda z_NF: jump_relu(z_NF, self.log_threshold, bandwidth),
            l0=lambda z_NF: step(z_NF, self.log_threshold, bandwidth).sum(1).mean(),
            log_threshold_F=self.log_threshold,
        )

    @torch.no_grad()
    def start(self) -> None:
        """One threshold for all."""
        self.log_threshold.fill_(math.log(self.terms.learning.threshold_init))


class GatedRule(DenseRule):
    """The gate learns through the penalty and a reconstruction of its own."""

    def form(self) -> DenseForm:
        """The gate passes no gradient to the magnitudes' latents."""
        group, activation = self.own.group, self.own.group.activation
        assert isinstance(activation, Gated)

        def gated(z_NF: Tensor) -> Tensor:
            magnitude_NF = torch.exp(activation.r_mag) * (z_NF - group.b_enc) + activation.b_mag
            return torch.relu(magnitude_NF) * (z_NF.detach() > 0)

        return DenseForm(activation=gated, gate=torch.relu)


RULES: dict[str, type[Rule]] = {
    "topk": TopKRule,
    "batchtopk": BatchTopKRule,
    "relu": ReLURule,
    "jumprelu": JumpReLURule,
    "gated": GatedRule,
}
