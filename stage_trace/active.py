"""The latents of one group that fire on a prompt: which, where, how strongly, and what each of them reads and writes.

    transcoder, CLT    f_i[p] = e_i . x[p] + c_i
    Lorsa              f_i[p] = e_i . sum_s A_h[p, s] x[s] + c_i        h: the head that serves latent i

Rows and values are in the units of raw activations: a dictionary's normalisation is folded into its weights. With a
Lorsa's own patterns A held, its latents are linear in what is read too. Encoder and decoder rows are not held: whoever
needs them reads them, position by position.
Shapes: N active latents, n of a position or of a batch, T positions, D width of the stream, F latents of the group, H
heads of a Lorsa.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from shared.sae.activations import Gated
from shared.sae.groups import LatentGroup
from shared.sae.variants import Dictionary, Lorsa
from stage_trace.group_weights import GroupRows, GroupWeights
from stage_trace.patterns import Patterns, fire_by
from stage_trace.places import Place


@dataclass(frozen=True, slots=True)
class ActiveLatents:
    """Those of one group, sorted by position and latent."""

    weights: GroupWeights
    position_N: Tensor
    latent_N: Tensor
    value_N: Tensor
    constant_N: Tensor
    """What a value holds beside what it reads: ``value = encoder . seen + constant``."""
    patterns: Patterns | None = None
    """Of a Lorsa."""

    @property
    def read(self) -> HookPoint:
        """Where they read."""
        return self.weights.place.read

    @property
    def writes(self) -> tuple[HookPoint, ...]:
        """The outputs that they write."""
        return self.weights.place.writes

    def encoder(self, some: Tensor | slice) -> Tensor:
        """Encoder rows [n, D] of `some` of them."""
        return self.weights.encoder(self.latent_N[some])

    def decoder(self, output: HookPoint, some: Tensor | slice) -> Tensor:
        """Decoder rows [n, D] of `some` of them for `output`, one of `writes`."""
        return self.weights.decoder(output, self.latent_N[some])

    def seen(self, some: Tensor | slice, x_TD: Tensor) -> Tensor:
        """What `some` of them read of the site `x_TD`, before their encoder rows: [n, D]."""
        return seen(self.patterns, self.latent_N[some], self.position_N[some], x_TD)

    def written(self, output: HookPoint, like_TD: Tensor) -> Tensor:
        """[T, D]: what they add to `output`, all of them at every position."""
        written_TD = torch.zeros_like(like_TD)
        for position, some in self.by_position():
            written_TD[position] = self.value_N[some] @ self.decoder(output, some)
        return written_TD

    def by_position(self) -> Iterator[tuple[int, slice]]:
        """Every position with latents, and where they lie."""
        counts = torch.bincount(self.position_N).tolist()
        start = 0
        for position, count in enumerate(counts):
            if count:
                yield position, slice(start, start + count)
            start += count


def seen(patterns: Patterns | None, latent_n: Tensor, position_n: Tensor, x_TD: Tensor) -> Tensor:
    """What latents at some positions read of a site, [n, D]: its row there, or by a Lorsa's patterns a mixture."""
    return x_TD[position_n] if patterns is None else patterns.of(latent_n, position_n, x_TD) @ x_TD


def active(
    dictionary: Dictionary,
    rows: GroupRows,
    number: int,
    place: Place,
    x_TD: Tensor,
    fixed_T: Tensor,
    patterns: Patterns | None = None,
) -> ActiveLatents:
    """Which latents of a group fire, by the group itself; their values from the folded rows, in the type of x.

    A Lorsa attends by `patterns` where they are given, else by its own of x.
    """
    group: LatentGroup = dictionary.groups[number]
    weights = GroupWeights.of(dictionary, rows, number, place, x_TD)
    folded = weights.folded
    dtype = dictionary.b_dec.dtype
    normal_TD = (x_TD.to(dtype) - folded.input_mean.to(dtype)) * folded.input_scale.to(dtype)
    if isinstance(dictionary, Lorsa):
        patterns = patterns or Patterns.of_prompt(dictionary, folded, x_TD)
        indices_TK = fire_by(patterns, dictionary, normal_TD)
    else:
        _, indices_TK = group.fire(normal_TD)
    position_N, slot_N = torch.nonzero((indices_TK >= 0) & ~fixed_T[:, None], as_tuple=True)
    latent_N = indices_TK[position_N, slot_N]
    order = torch.argsort(position_N * group.num_latents + latent_N)
    position_N, latent_N = position_N[order], latent_N[order]

    activation = group.activation
    constant_F = activation.b_mag if isinstance(activation, Gated) else group.b_enc
    constant_N = constant_F[latent_N].to(x_TD).clone()
    value_N = torch.empty_like(constant_N)
    found = ActiveLatents(weights, position_N, latent_N, value_N, constant_N, patterns)
    for position, some in found.by_position():
        encoder_nD = found.encoder(some)
        constant_N[some] -= encoder_nD @ folded.input_mean
        seen_D = x_TD[position] if patterns is None else found.seen(some, x_TD)
        value_N[some] = (encoder_nD * seen_D).sum(1) + constant_N[some]
    return found
