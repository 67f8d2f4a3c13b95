"""What the rows of a graph explain: active latents, and logits at the last position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearParts
from stage_trace.active import seen
from stage_trace.replacement import Replacement


@dataclass(frozen=True, slots=True)
class Targets:
    """Linear readings of the stream, one per row, and what each row must sum to."""

    output_B: Tensor
    """int64: the own output, by its number, of the latents that these are; the number of outputs stands for the logits,
    which read the final norm's output."""
    latent_B: Tensor
    """int64; -1 for logits."""
    position_B: Tensor
    vector_BD: Tensor
    goal_B: Tensor

    def __len__(self) -> int:
        return len(self.output_B)

    @classmethod
    def joined(cls, parts: "Sequence[Targets]") -> "Targets":
        """Those of all `parts`, in their order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, some: Tensor) -> "Targets":
        """Those numbered `some`, int64."""
        return Targets(*(getattr(self, field.name)[some] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Features:
    """Every active latent as a target, in the order of the columns; vectors are read for those that are chosen."""

    replacement: Replacement
    output_N: Tensor
    latent_N: Tensor
    position_N: Tensor
    goal_N: Tensor

    @classmethod
    def of(cls, replacement: Replacement) -> "Features":
        """Find those of one prompt."""
        latents = [one.latents for one in replacement.stand_ins]
        return cls(
            replacement,
            torch.cat([torch.full_like(one.position_N, number) for number, one in enumerate(latents)]),
            torch.cat([one.latent_N for one in latents]),
            torch.cat([one.position_N for one in latents]),
            torch.cat([one.value_N - one.constant_N for one in latents]),
        )

    def __len__(self) -> int:
        return len(self.output_N)

    def __getitem__(self, some: Tensor) -> Targets:
        """Those numbered `some`, int64 [B]."""
        output_B, start = self.output_N[some], 0
        D = len(self.replacement.stand_ins[0].bias_D)
        vector_BD = self.goal_N.new_zeros(len(some), D)
        for number, stand_in in enumerate(self.replacement.stand_ins):
            here = torch.nonzero(output_B == number).flatten()
            if len(here):
                vector_BD[here] = stand_in.latents.encoder(some[here] - start)
            start += len(stand_in.latents.value_N)
        return Targets(output_B, self.latent_N[some], self.position_N[some], vector_BD, self.goal_N[some])


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits that a graph explains, the likeliest first."""

    tokens: Tensor
    """int64 [n]."""
    probabilities: Tensor
    """[n], of the softmax over the whole vocabulary."""

    @classmethod
    def choose(cls, logits_V: Tensor, mass: float, most: int, tokens: Sequence[int] | None = None) -> "Logits":
        """The fewest tokens with a probability of `mass` together, at most `most`; or the `tokens` that are given."""
        probabilities_V = torch.softmax(logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)), -1)
        if tokens is not None:
            outside = [token for token in tokens if not 0 <= token < len(logits_V)]
            if outside or not tokens:
                raise GranaryError(f"token {outside or 'list'} is not in the vocabulary of {len(logits_V)}")
            chosen = torch.tensor(list(tokens), device=logits_V.device)
            return cls(chosen, probabilities_V[chosen])
        likeliest = torch.topk(probabilities_V, min(most, len(probabilities_V)))
        before = torch.cumsum(likeliest.values, 0) - likeliest.values
        count = int((before < mass).sum())
        return cls(likeliest.indices[:count], likeliest.values[:count])


def logit_targets(logits: Logits, parts: LinearParts, recording: Recording, outputs: int) -> Targets:
    """One row per logit, less the mean logit of the vocabulary; before a softcap, which is not linear.

    `outputs` is how many are stood in for.
    """
    final_TD = recording.final_TD
    vector_BD = parts.logit_vectors(logits.tokens, final_TD.dtype)
    T = len(final_TD)
    return Targets(
        torch.full_like(logits.tokens, outputs),
        torch.full_like(logits.tokens, -1),
        torch.full_like(logits.tokens, T - 1),
        vector_BD,
        vector_BD @ final_TD[-1],
    )


def reading(targets: Targets, replacement: Replacement, row: int, sites: Mapping[HookPoint, Tensor]) -> Tensor:
    """[D]: what the feature of a row reads of a run's `sites`, before its encoder row."""
    latents = replacement.stand_ins[int(targets.output_B[row])].latents
    some = slice(row, row + 1)
    return seen(latents.patterns, targets.latent_B[some], targets.position_B[some], sites[latents.read])[0]
