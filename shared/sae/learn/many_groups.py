"""The losses of a dictionary of several groups of latents, such as a CLT: no product with a decoder is ever dense.

Each group chooses among its own pre-activations, or all together; what fires is decoded pair by pair into the columns
that the group writes, and one error over all columns is the loss. Shapes: N rows, D_in and D_out widths of what is read
and written, K picks of a group per row, P pairs, F latents of a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.kernels import PairOrder, attach_encoder, product, take_rows
from shared.sae.activations import TopK
from shared.sae.contexts import Given
from shared.sae.learn import batch_facts
from shared.sae.learn.activations import RULES, BatchTopKRule, Rule, TopKRule
from shared.sae.learn.batch_facts import Reduce, SelectionMemory
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs, dead_indices
from shared.sae.learn.losses import preact_loss, saturated, weighted_square_error
from shared.sae.learn.straight_through import jump_relu, step
from shared.sae.learn.terms import GroupTerms, LossTerms
from shared.sae.variants.base import Picks
from shared.sae.variants.clt import largest


class ManyGroups:
    """What the activation makes of learning several groups."""

    def __init__(self, terms: LossTerms) -> None:
        self.terms = terms
        self.rules: list[Rule] = [RULES[terms.dictionary.config.activation](terms, own) for own in terms.groups]
        """Of each group by itself."""
        self.together = getattr(terms.dictionary.config, "k_scope", "layer") == "all"
        """Whether k latents are chosen over all groups."""
        self.memory = SelectionMemory()
        first = self.rules[0]
        self.scale_search, self.overshoot, self.looks_at_all = first.scale_search, first.overshoot, first.looks_at_all
        self._dead: tuple[Tensor, list[Tensor]] | None = None

    def losses(self, x: Given, y: Tensor, inputs: StepInputs) -> Losses:
        """See ``Objective.losses``."""
        terms, learning = self.terms, self.terms.learning
        with torch.no_grad():
            normal, target_ND, _, _ = terms.prepare(x, y)
            given = self._columns(normal)
        firing = [
            self._fire(rule, given_ND, picks)
            for rule, given_ND, picks in zip(self.rules, given, self._choose(given, inputs, len(x)), strict=True)
        ]
        decoded = self._decode(firing)
        starts = [writes.start or 0 for _, writes in terms.dictionary.decoders]
        error_ND = add_up(decoded, starts, target_ND.shape[1]) + terms.dictionary.b_dec - target_ND
        reconstruction = weighted_square_error(error_ND, terms.loss_weight())
        total, metrics = reconstruction, {"reconstruction": reconstruction.detach(), "fvu": terms.fvu(error_ND)}
        metrics |= terms.fvu_by_site(error_ND)
        penalties = [fired.penalty for fired in firing if fired.penalty is not None]
        if penalties:
            penalty = torch.stack(penalties).sum() / len(x)
            total = total + learning.penalty_weight * inputs.penalty_scale * penalty
            metrics["penalty"] = penalty.detach()
        residual_ND = -error_ND.detach()
        helped = self._help_dead(residual_ND, given, inputs)
        for name, weight, loss in helped:
            total = total + weight * loss
            metrics[name] = metrics[name] + loss.detach() if name in metrics else loss.detach()
        with torch.no_grad():
            counts = [fired.is_on_NK.sum(dtype=torch.float32) for fired in firing]
            metrics["l0"] = sum(counts, start=y.new_zeros(())) / len(x)
            metrics |= {f"l0/{name}": count / len(x) for name, count in zip(self._names(), counts, strict=False)}
            fired_F = torch.cat([self._fired(rule.own, one) for rule, one in zip(self.rules, firing, strict=True)])
        return Losses(total=total, reconstruction=metrics["reconstruction"], fired=fired_F, metrics=metrics)

    def _names(self) -> Sequence[str]:
        """Of the groups here; none where there is one in all."""
        return self.terms.dictionary.group_names

    # What fires

    def _columns(self, normal: Given) -> list[Tensor]:
        """What each group reads."""
        assert isinstance(normal, Tensor)
        return [normal[:, rule.own.reads].contiguous() for rule in self.rules]

    @torch.no_grad()
    def _choose(self, given: Sequence[Tensor], inputs: StepInputs, rows: int) -> list[Picks]:
        """Pre-activations of each group that may fire, and their latents."""
        if isinstance(self.rules[0], BatchTopKRule):
            facts = inputs.facts
            if facts is None:
                (facts,) = self._facts([[one] for one in given], rows, inputs.k, batch_facts.alone)
            chosen = [
                rule.select(one, inputs.with_facts(own))
                for rule, one, own in zip(self._batch_rules, given, facts.groups, strict=True)
            ]
            return [(picks.values_NK, picks.indices_NK) for picks in chosen]
        if isinstance(self.rules[0], TopKRule):
            k = self.rules[0].own.k if inputs.k is None else inputs.k
            found = []
            for rule, one in zip(self.rules, given, strict=True):
                activation = rule.own.group.activation
                assert isinstance(activation, TopK)
                found.append(activation.select(rule.own.group.encoder(), one, min(k, rule.own.d_latent)))
            return largest(found, k) if self.together else found
        return [
            rule.own.group.encoder().above(one, self._lowest(rule.own))
            for rule, one in zip(self.rules, given, strict=True)
        ]

    def _decode(self, firing: Sequence["Firing"]) -> list[Tensor]:
        """What each decoder writes, from what the groups fire."""
        return [
            rule.own.group.write(fired.values_NK, fired.indices_NK, fired.order, rule.own.sink("W_dec"))
            for rule, fired in zip(self.rules, firing, strict=True)
        ]

    def _lowest(self, own: GroupTerms) -> Tensor | float:
        """Below which a pre-activation neither fires nor teaches its threshold: 0, or the rectangle's lower end."""
        thresholds = getattr(own.group.activation, "log_threshold", None)
        if thresholds is None:
            return 0.0
        return torch.clamp_min(thresholds.detach().exp() - own.learning.bandwidth / 2, 0.0)

    def _fire(self, rule: Rule, given_ND: Tensor, picks: Picks) -> "Firing":
        """The latents of the picks with their gradients, and their penalty."""
        own, (z_NK, indices_NK) = rule.own, picks
        group, learning = own.group, own.learning
        order = PairOrder(indices_NK, group.num_latents)
        z_NK = attach_encoder(
            given_ND, None, group.W_enc, group.b_enc, z_NK, indices_NK, order,
            compute=group.compute, sink=own.sink("W_enc"),
        )  # fmt: skip
        is_pick_NK, safe_NK = indices_NK >= 0, indices_NK.clamp_min(0)
        thresholds = getattr(group.activation, "log_threshold", None)
        values_NK, l0 = z_NK, None
        if thresholds is not None:  # each pair with its own threshold, in one row
            theta_P = _gather(thresholds, safe_NK).reshape(-1)
            flat_1P = z_NK.masked_fill(~is_pick_NK, 0).reshape(1, -1)
            values_NK = jump_relu(flat_1P, theta_P, learning.bandwidth).view_as(z_NK)
            if learning.penalty == "l0":
                l0 = step(flat_1P, theta_P, learning.bandwidth).sum()
        is_on_NK = is_pick_NK & (values_NK.detach() > 0)
        fired = Firing(values_NK, indices_NK, is_on_NK, order, l0)
        if learning.penalty in ("l1", "tanh"):
            fired.penalty = self._penalty(own, fired)
        return fired

    def _penalty(self, own: GroupTerms, fired: "Firing") -> Tensor | None:
        """l1 or tanh of what a group fires."""
        return penalty_of(own.learning, fired, own.group.decoder_norm())

    @staticmethod
    def _fired(own: GroupTerms, fired: "Firing") -> Tensor:
        """bool [F]: which latents of a group were on."""
        count = own.group.num_latents
        on_F = torch.zeros(count + 1, dtype=torch.bool, device=fired.indices_NK.device)
        on_F.index_fill_(0, torch.where(fired.is_on_NK, fired.indices_NK, count).reshape(-1), True)
        return on_F[:-1]

    # Dead latents

    def _help_dead(
        self, residual_ND: Tensor, given: Sequence[Tensor], inputs: StepInputs
    ) -> list[tuple[str, float, Tensor]]:
        """Name, weight and loss of what teaches the dead latents of each group."""
        learning, found = self.terms.learning, []
        if inputs.dead is None:
            return []
        alpha, share = learning.auxk_alpha / len(self.rules), 1 / len(self.rules)
        dead = self._dead_of_groups(inputs.dead)
        for number, (rule, given_ND, dead_R) in enumerate(zip(self.rules, given, dead, strict=True)):
            own = rule.own
            auxk = own.auxk(residual_ND[:, own.writes].contiguous(), given_ND, dead_R)
            if auxk is not None:
                found.append(("auxk", alpha / share, auxk * share))
            found += self._lift(number, given_ND, dead_R, inputs)
        return found

    def _lift(
        self, number: int, given_ND: Tensor, dead_R: Tensor, inputs: StepInputs
    ) -> list[tuple[str, float, Tensor]]:
        """The pre-activation loss of a group's dead latents; nothing where it is off or they have no thresholds."""
        own = self.rules[number].own
        group, thresholds = own.group, getattr(own.group.activation, "log_threshold", None)
        if own.learning.preact_weight <= 0 or thresholds is None or not dead_R.numel():
            return []
        norm_F, rows_RD = self._norm(number), take_rows(group.W_enc, dead_R, own.sink("W_enc"))
        z_NR = product(given_ND, rows_RD.T, group.b_enc[dead_R], compute=group.compute)
        below = preact_loss(z_NR, thresholds[dead_R], None if norm_F is None else norm_F[dead_R])
        return [("preact", own.learning.preact_weight * inputs.penalty_scale, below)]

    def _norm(self, number: int) -> Tensor | None:
        """Of a group's decoder rows, [F]; None: they are 1."""
        return self.rules[number].own.group.decoder_norm()

    def _dead_of_groups(self, dead: Tensor) -> list[Tensor]:
        """The dead latents of each group by its own numbers; kept while the same tensor is given, step after step."""
        if self._dead is None or self._dead[0] is not dead:
            dead_R, parts, first = dead_indices(dead), [], 0
            for rule in self.rules:
                last = first + rule.own.d_latent
                parts.append(dead_R[(dead_R >= first) & (dead_R < last)] - first)
                first = last
            self._dead = dead, parts
        return self._dead[1]

    # What the losses must know of the batch

    @property
    def _batch_rules(self) -> list[BatchTopKRule]:
        return [rule for rule in self.rules if isinstance(rule, BatchTopKRule)]

    def needs_facts(self, *, cut: bool) -> bool:
        """See ``Objective.needs_facts``."""
        return self.rules[0].needs_facts(cut=cut)

    def facts(
        self, centred: Sequence[Given], num_tokens: int, k: int | None, reduce_all: Reduce, reduce_rows: Reduce
    ) -> list[BatchFacts]:
        """Collect those of the micro-batches' encoder inputs; see ``Objective.facts``."""
        parts = [self._columns(normal) for normal in centred]
        return self._facts(list(zip(*parts, strict=True)), num_tokens, k, reduce_all)

    def _facts(
        self, given: Sequence[Sequence[Tensor]], num_tokens: int, k: int | None, reduce: Reduce
    ) -> list[BatchFacts]:
        """`given` are each group's inputs, one tensor per micro-batch."""
        rules = self._batch_rules
        if not self.together:
            found = [rule.facts(one, num_tokens, k, reduce, reduce) for rule, one in zip(rules, given, strict=True)]
        else:
            k = rules[0].own.k if k is None else k
            wanted = num_tokens * min(k, self.terms.dictionary.config.d_latent)
            found = batch_facts.select_over_batch(
                [rule.own.group.encoder() for rule in rules],
                given,
                wanted=wanted,
                most=wanted,
                memory=self.memory,
                first_guess=rules[0].activation.threshold,
                reduce=reduce,
            )
        return [BatchFacts(groups=of_part) for of_part in zip(*found, strict=True)]

    def after_step(self, facts: BatchFacts | None) -> None:
        """What the activations learn beside gradients."""
        of_groups = [None] * len(self.rules) if facts is None else facts.groups
        for rule, own in zip(self.rules, of_groups, strict=True):
            rule.after_step(own)

    # The start

    def start(self) -> None:
        """Set the activations' own parameters to where learning begins."""
        for rule in self.rules:
            rule.start()

    def fit_to_sample(self, centred: Given) -> None:
        """Set what follows from the encoders and a sample of their inputs [M, D_in]."""
        given = self._columns(centred)
        if not (self.together and self._batch_rules):
            for rule, one in zip(self.rules, given, strict=True):
                rule.fit_to_sample(one)
            return
        memory, self.memory = self.memory, SelectionMemory(0.0)
        (facts,) = self._facts([[one] for one in given], len(centred), None, batch_facts.alone)
        self.memory = memory
        for rule, own in zip(self._batch_rules, facts.groups, strict=True):
            assert own.least is not None
            rule.activation.threshold.copy_(own.least)


class Firing:
    """What a group fires on a batch."""

    def __init__(
        self, values_NK: Tensor, indices_NK: Tensor, is_on_NK: Tensor, order: PairOrder, penalty: Tensor | None
    ) -> None:
        self.values_NK, self.indices_NK, self.is_on_NK = values_NK, indices_NK, is_on_NK
        self.order = order
        """Of the pairs, for encoder and decoder."""
        self.penalty = penalty
        """Sum over rows and latents; None without one."""


def penalty_of(learning: LearningConfig, fired: Firing, norm_F: Tensor | None) -> Tensor:
    """l1 or tanh, weighed by the norms of the decoder's rows; None: they are 1."""
    is_pick_NK = fired.indices_NK >= 0
    norm_NK = None if norm_F is None else _gather(norm_F, fired.indices_NK.clamp_min(0))
    kept_NK = fired.values_NK.masked_fill(~is_pick_NK, 0)
    strength_NK = kept_NK if norm_NK is None else kept_NK * norm_NK
    return (saturated(kept_NK, learning, norm_NK) if learning.penalty == "tanh" else strength_NK).sum()


def _gather(values_F: Tensor, indices_NK: Tensor) -> Tensor:
    """``values[indices]``, with a gradient that sums in a fixed order."""
    return values_F.index_select(0, indices_NK.reshape(-1)).view_as(indices_NK)


class _AddUp(torch.autograd.Function):
    """Each part added to its columns of one tensor; a part's gradient is those columns."""

    @staticmethod
    def forward(ctx: Any, starts: Sequence[int], width: int, *parts: Tensor) -> Tensor:
        ctx.columns = [slice(start, start + part.shape[1]) for start, part in zip(starts, parts, strict=True)]
        total = parts[0].new_zeros(len(parts[0]), width)
        for columns, part in zip(ctx.columns, parts, strict=True):
            total[:, columns] += part
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad[:, columns] for columns in ctx.columns)


def add_up(parts: Sequence[Tensor], starts: Sequence[int], width: int) -> Tensor:
    """[N, width]: the sum of the `parts`, each [N, its width] from column `starts[i]` on."""
    total: Tensor = _AddUp.apply(starts, width, *parts)
    return total
