"""The losses of a CLT whose layers are dealt among processes: each has a part of the sum that is the loss.

A process encodes its layers, all learn what fires, and each makes the error at the columns that it writes. Every
parameter is on one process, so no gradient is summed over them: only the gradients of values go back to who encodes.
Shapes: as in ``many_groups`` and ``layer_ranks``; R dead latents of a layer, S layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.kernels import PairOrder, decode, sparse_decode, take_rows
from shared.sae.activations import TopK
from shared.sae.contexts import Given
from shared.sae.learn.activations import TopKRule
from shared.sae.learn.batch_facts import Reduce, alone
from shared.sae.learn.clt_auxk import auxk_over_ranks
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.layer_ranks import Exchange, LayerRanks, meet, square_sums
from shared.sae.learn.losses import reconstruction_weight
from shared.sae.learn.many_groups import Firing, ManyGroups, penalty_of
from shared.sae.learn.terms import GroupTerms, LossTerms
from shared.sae.variants.base import Picks
from shared.sae.variants.clt import largest
from shared.sae.variants.clt_part import CLTPart


class PartTerms(LossTerms):
    """What is made of a loss at the columns that are written here."""

    @property
    def part(self) -> CLTPart:
        """The process's."""
        assert isinstance(self.dictionary, CLTPart)
        return self.dictionary

    @property
    def ranks(self) -> LayerRanks:
        """All processes."""
        assert isinstance(self.shard, LayerRanks)
        return self.shard

    def prepare(self, x: Given, y: Tensor) -> tuple[Given, Tensor, Tensor | None, Tensor | None]:
        normal, target_ND, token_mean, token_scale = super().prepare(x, y)
        return normal, self.part.own_columns(target_ND), token_mean, token_scale

    def _weight(self, loss: str) -> Tensor:
        """Of each site as in a mean over all of them, also those that are elsewhere."""
        sites = self.part.target_variance.split(self.part.widths.writes)
        whole = torch.cat([reconstruction_weight(site, loss) for site in sites]) / self.part.config.num_groups
        return self.part.own_columns(whole)

    def loss_weight(self) -> Tensor:
        return self._weight(self.learning.loss)

    def fvu_weight(self) -> Tensor:
        return self._weight("fvu")

    def fvu_by_site(self, error_ND: Tensor) -> dict[str, Tensor]:
        part = self.part
        if part.config.num_groups == 1:
            return {}
        names = [part.written_sites[layer] for layer in part.share.layers]
        errors, variances = error_ND.detach().split(part.columns, 1), part.target_variance.split(part.widths.writes)
        return {
            f"fvu/{name}": error.square().sum(1).mean() / variance.sum()
            for name, error, variance in zip(names, errors, variances, strict=True)
        }

    def fire(self, centred: Given) -> list[Picks]:
        part = self.part
        assert isinstance(centred, Tensor)
        given = [centred[:, reads].contiguous() for reads, _ in part.places]
        if part.config.activation == "topk":
            assert part.config.k is not None
            own = best_of_shares(part, given, part.config.k)
            own = chosen(self.ranks, own, part.config.k, together=part.config.k_scope == "all")
        else:
            own = [group.fire(one) for group, one in zip(part.groups, given, strict=True)]
        exchange = self.exchange([indices_NK for _, indices_NK in own])
        return list(zip(exchange.values([values_NK for values_NK, _ in own]), exchange.indices, strict=True))

    def exchange(self, indices: Sequence[Tensor]) -> Exchange:
        """Exchange what the layers here fire."""
        part = self.part
        first, _ = part.share.span(part.config.per_layer)
        return Exchange(self.ranks, indices, [first] * len(indices), len(part.decoders))

    def decoded(self, picks: Sequence[Picks], centred: Given) -> Tensor:
        part = self.part
        y_ND = picks[0][0].new_zeros(len(picks[0][0]), len(part.b_dec))
        for (W_dec, writes), one in zip(part.decoders, picks, strict=True):
            y_ND[:, writes] += decode(*one, W_dec, kernels=part.kernels)
        return y_ND

    def sum_over_columns(self, parts: Tensor) -> Tensor:
        self.ranks.sum(parts)
        return parts

    def row_norms(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return [norm_F[:, None] for norm_F in square_sums(self.ranks, rows).sqrt()[: len(rows)]]

    def token_norms(self, y_ND: Tensor) -> Tensor:
        square_N = y_ND.norm(dim=1).square()
        self.ranks.sum(square_N)
        return square_N.sqrt()


class PartOfGroups(ManyGroups):
    """Learning of the layers here, with those that are elsewhere."""

    terms: PartTerms
    _norms_LF: Tensor | None = None
    """Of all whole decoder rows, with gradient, where the losses of a batch need them."""

    def _choose(self, given: Sequence[Tensor], inputs: StepInputs, rows: int) -> list[Picks]:
        if not isinstance(self.rules[0], TopKRule):
            assert inputs.facts is not None or not self._batch_rules
            return super()._choose(given, inputs, rows)
        k = self.rules[0].own.k if inputs.k is None else inputs.k
        return chosen(self.terms.ranks, best_of_shares(self.terms.part, given, k), k, together=self.together)

    def _names(self) -> Sequence[str]:
        part = self.terms.part
        return [part.group_names[layer] for layer in part.share.layers] if part.group_names else ()

    def _penalty(self, own: GroupTerms, fired: Firing) -> Tensor | None:
        """When the norms of whole rows are known."""
        return None

    def _decode(self, firing: Sequence[Firing]) -> list[Tensor]:
        part, learning = self.terms.part, self.terms.learning
        penalised = learning.penalty in ("l1", "tanh")
        weighed = not part.config.unit_norm_decoder and (penalised or learning.preact_weight > 0)
        exchange = self.terms.exchange([fired.indices_NK for fired in firing])
        decoders = [W_dec for W_dec, _ in part.decoders]
        picks, self._norms_LF = meet(exchange, [fired.values_NK for fired in firing], decoders if weighed else [])
        if penalised:
            for number, (rule, fired) in enumerate(zip(self.rules, firing, strict=True)):
                fired.penalty = penalty_of(rule.own.learning, fired, self._norm(number))
        return [
            sparse_decode(values_NK, indices_NK, W_dec, PairOrder(indices_NK, len(W_dec)), compute=part.compute)
            for W_dec, (values_NK, indices_NK) in zip(decoders, picks, strict=True)
        ]

    def _norm(self, number: int) -> Tensor | None:
        """Of the rows of the latents that a layer here encodes, [F]; None: they are 1."""
        share = self.terms.part.share
        if self._norms_LF is None:
            return None
        return self._norms_LF[share.layers[number]].narrow(0, *share.span(self._norms_LF.shape[1]))

    # What the losses must know of the batch

    @property
    def _reduce(self) -> Reduce:
        """Over all that choose together."""
        ranks = self.terms.ranks
        if self.together:
            return ranks.sum
        return alone if ranks.own.parts == 1 else ranks.sum_in_layer

    def facts(self, centred: Sequence[Given], num_tokens: int, k: int | None, *_: Reduce) -> Any:
        parts = [self._columns(normal) for normal in centred]
        return self._facts(list(zip(*parts, strict=True)), num_tokens, k, self._reduce)

    def fit_to_sample(self, centred: Given) -> None:
        if not self._batch_rules:
            super().fit_to_sample(centred)
            return
        memories = [self.memory, *(rule.memory for rule in self._batch_rules)]
        before = [memory.lower_bound for memory in memories]
        for memory in memories:
            memory.lower_bound = 0.0
        (facts,) = self._facts([[one] for one in self._columns(centred)], len(centred), None, self._reduce)
        for memory, bound in zip(memories, before, strict=True):
            memory.lower_bound = bound
        for rule, own in zip(self._batch_rules, facts.groups, strict=True):
            assert own.least is not None
            rule.activation.threshold.copy_(own.least)

    # Dead latents

    def _help_dead(
        self, residual_ND: Tensor, given: Sequence[Tensor], inputs: StepInputs
    ) -> list[tuple[str, float, Tensor]]:
        learning, ranks = self.terms.learning, self.terms.ranks
        found = []
        dead = [] if inputs.dead is None else self._dead_of_groups(inputs.dead)
        if learning.auxk_alpha > 0 and dead and any(latents_R.numel() for latents_R in ranks.dead):
            found.append(("auxk", learning.auxk_alpha, self._auxk(residual_ND, given, dead)))
        for number, dead_R in enumerate(dead):
            found += self._lift(number, given[number], dead_R, inputs)
        return found

    def _auxk(self, residual_ND: Tensor, given: Sequence[Tensor], dead: Sequence[Tensor]) -> Tensor:
        """The mean over layers of their AuxK losses, as far as it is made here."""
        part, ranks = self.terms.part, self.terms.ranks
        widths = [d_out for _, d_out in part.sizes()]
        aux = [self.terms.learning.num_aux(width) for width in widths]
        own = [
            (given_ND.detach(), take_rows(rule.own.group.W_enc, dead_R), rule.own.group.b_enc[dead_R])
            for rule, given_ND, dead_R in zip(self.rules, given, dead, strict=True)
        ]
        decoders = [
            (residual_ND[:, writes], take_rows(W_dec, dead_R))
            for (W_dec, writes), dead_R in zip(part.decoders, ranks.dead, strict=False)
        ]
        return auxk_over_ranks(ranks, aux, own, decoders, self.terms.learning.auxk_slope)

    def _dead_of_groups(self, dead: Tensor) -> list[Tensor]:
        """Of the layers here, by the numbers of the latents that they encode here."""
        share, per_layer = self.terms.part.share, self.terms.part.config.per_layer
        first, rows = share.span(per_layer)
        return [
            one[(one >= first) & (one < first + rows)] - first
            for one in (self.terms.ranks.dead[layer] for layer in share.layers)
        ]


@torch.no_grad()
def best_of_shares(part: CLTPart, given: Sequence[Tensor], k: int) -> list[Picks]:
    """topk: of each layer here, the k largest of the latents here, from what each reads."""
    found = []
    for group, given_ND in zip(part.groups, given, strict=True):
        assert isinstance(group.activation, TopK)
        found.append(group.activation.select(group.encoder(), given_ND, min(k, group.num_latents)))
    return found


def chosen(ranks: LayerRanks, own: Sequence[Picks], k: int, *, together: bool) -> list[Picks]:
    """Choose the k best of each layer, or of all together, from the k best of every share; returns those that are here.

    `own` are the shares of the layers here.
    """
    if not together and ranks.own.parts == 1:
        return list(own)
    mine_SNK = ranks.padded([values_NK for values_NK, _ in own])
    if together:
        values_RSNK = ranks.gather(mine_SNK)
        homes = [home for layer in range(ranks.num_layers) for home in ranks.homes(layer)]
        everyone = [(values_RSNK[home], own[home[1]][1] if home[0] == ranks.rank else None) for home in homes]
        best = dict(zip(homes, largest([_with_indices(*one) for one in everyone], k), strict=True))
        return [best[ranks.rank, slot] for slot in range(len(own))]
    values_PSNK, found = ranks.gather_in_layer(mine_SNK), []
    for slot, (_, indices_NK) in enumerate(own):
        parts = [
            _with_indices(values_PSNK[part, slot], indices_NK if part == ranks.own.part else None)
            for part in range(ranks.own.parts)
        ]
        found.append(largest(parts, k)[ranks.own.part])
    return found


def _with_indices(values_NK: Tensor, indices_NK: Tensor | None) -> Picks:
    """Those of another process are only compared: some index stands for them."""
    if indices_NK is None:
        indices_NK = torch.where(values_NK > 0, 0, -1)
    return values_NK, indices_NK
