"""What a dictionary learns from: the losses of a batch, and what they must know of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.kernels import PairGradients
from shared.sae.contexts import Given
from shared.sae.latent_shard import LatentShard
from shared.sae.learn.activations import RULES, Rule
from shared.sae.learn.batch_facts import Reduce, alone
from shared.sae.learn.clt_part import PartOfGroups, PartTerms
from shared.sae.learn.config import LearningConfig, check, learning_of
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.many_groups import ManyGroups
from shared.sae.learn.maps import collapse, load_names
from shared.sae.learn.terms import LossTerms
from shared.sae.variants.base import Dictionary
from shared.sae.variants.clt_part import CLTPart
from shared.sae.variants.one_group import OneGroup


class Objective(nn.Module):
    """A dictionary and how it is learnt. Owns the dictionary; nothing of this class is saved with it.

    Raises GranaryError for a way of learning that the dictionary does not allow.
    """

    def __init__(self, dictionary: Dictionary, learning: LearningConfig | None = None) -> None:
        super().__init__()
        self.learning = learning_of(dictionary.config.kind)() if learning is None else learning
        check(dictionary.config, self.learning)
        self.dictionary = dictionary
        self.terms, self.rule = _made_of(dictionary, self.learning)

    terms: LossTerms
    rule: Rule | ManyGroups
    """What the activation makes of learning."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics of its losses beside those that all have: FVU at each written site, where there are several, and L0
        of each group, likewise; the load of a MoLT's transforms."""
        names = self.dictionary.written_sites
        fvus = tuple(f"fvu/{name}" for name in names) if len(names) > 1 else ()
        loads = load_names(self.dictionary.config)
        return (*fvus, *(f"l0/{name}" for name in self.dictionary.group_names), *loads)

    def warning(self, means: Mapping[str, float]) -> str | None:
        """What the user must hear of the metrics of some steps; None: nothing."""
        return collapse(self.dictionary.config, means)

    @property
    def shard(self) -> LatentShard:
        """Which latents are held here: all of them, unless a layout says otherwise."""
        return self.terms.shard

    @shard.setter
    def shard(self, shard: LatentShard) -> None:
        self.terms.shard = shard

    @property
    def pair_gradients(self) -> PairGradients | None:
        """Where gradients that are sums over pairs go instead of ``.grad``; set by an optimiser that reads them."""
        return self.terms.pair_gradients

    @pair_gradients.setter
    def pair_gradients(self, gradients: PairGradients | None) -> None:
        self.terms.pair_gradients = gradients

    def forward(self, x: Given, y: Tensor, inputs: StepInputs | None = None) -> Losses:
        """See ``losses``."""
        return self.losses(x, y, inputs)

    def losses(self, x: Given, y: Tensor | None = None, inputs: StepInputs | None = None) -> Losses:
        """Loss of a batch of raw activations x, [N, D_in] or whole contexts of which N positions count, that must give
        y [N, D_out]; None: x itself.

        TopK and BatchTopK have a backward pass that costs N x K instead of N x F.
        """
        if y is None:
            assert isinstance(x, Tensor)
            y = x
        return self.rule.losses(x, y, StepInputs() if inputs is None else inputs)

    def needs_facts(self, *, cut: bool) -> bool:
        """Whether ``losses`` needs ``facts`` when the batch is `cut` into parts, or is not."""
        return self.rule.needs_facts(cut=cut)

    def facts(
        self,
        parts: Sequence[Given],
        num_tokens: int,
        *,
        k: int | None = None,
        reduce_all: Reduce = alone,
        reduce_rows: Reduce = alone,
    ) -> list[BatchFacts]:
        """What ``losses`` of each micro-batch must know of the whole batch, of `num_tokens` tokens.

        `parts` are this rank's micro-batches of raw activations, as ``losses`` takes them. `reduce_all` sums over all
        ranks, `reduce_rows` over those that hold the same latents; all call it together. `k` overrides the config's.
        """
        with torch.no_grad():
            centred: Any = [self.terms.given(part) for part in parts]
            return self.rule.facts(centred, num_tokens, k, reduce_all, reduce_rows)


def _made_of(dictionary: Dictionary, learning: LearningConfig) -> tuple[LossTerms, Rule | ManyGroups]:
    """Pieces of the losses and how they are put together."""
    if isinstance(dictionary, CLTPart):
        part = PartTerms(dictionary, learning)
        return part, PartOfGroups(part)
    terms = LossTerms(dictionary, learning)
    if isinstance(dictionary, OneGroup):
        return terms, RULES[dictionary.config.activation](terms, terms.sole)
    return terms, ManyGroups(terms)
