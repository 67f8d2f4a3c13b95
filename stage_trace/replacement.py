"""The local replacement model of one prompt: what stands in for what each branch adds, position by position.

    out[p] = sum_i f_i d_i + b + W_skip x[p] + error[p]       p: free positions
    out[p] = rest[p] + W_skip x[p]                            p: positions that no dictionary was taught

An output `out` is what the MLP of a layer adds, or its attention where a Lorsa stands in for that. f_i are active
latents, d_i their decoder rows for it, all in the units of raw activations. A transcoder's latents write the MLP of
their own layer, those of a CLT the later ones too, a Lorsa's the attention of theirs. Everything but the skip, which is
connected everywhere, is a leaf of the graph; f_i is also a row, since it reads the stream (``stage_trace.active``).

Attention without a Lorsa is no output: it stays, with its patterns held. Stand-ins lie in the order of the computation,
so that none reads what a later one writes. Shapes: N active latents, T positions, P of them fixed, D width of the
stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.sae.variants import Dictionary
from stage_trace.active import ActiveLatents, active
from stage_trace.group_weights import GroupRows, GroupWeights, raw_skip
from stage_trace.places import Place


@dataclass(frozen=True, slots=True)
class StandIn:
    """What stands in for one output, beside latents, and the latents that read at its layer."""

    output: HookPoint
    latents: ActiveLatents
    bias_D: Tensor
    skip: Tensor | None
    """W_skip [D, D] in raw units, from what `latents` reads."""
    error_TD: Tensor
    """0 at fixed positions."""
    rest_PD: Tensor
    """The output beside the skip at each of the fixed positions."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """All outputs of one prompt."""

    stand_ins: list[StandIn]
    fixed_T: Tensor
    """bool [T]: positions at which an output is one leaf."""

    @property
    def num_latents(self) -> int:
        """Active latents of all outputs."""
        return sum(len(one.latents.value_N) for one in self.stand_ins)

    @property
    def outputs(self) -> tuple[HookPoint, ...]:
        """Outputs in order: the MLP of every layer, and its attention before it where a Lorsa stands in."""
        return tuple(one.output for one in self.stand_ins)

    @property
    def free(self) -> Tensor:
        """bool [T]: the other positions."""
        return ~self.fixed_T


@dataclass(frozen=True, slots=True)
class Part:
    """What one group of a dictionary gives: its latents, and the bias and skip of its own layer's output."""

    latents: ActiveLatents
    bias_D: Tensor
    skip: Tensor | None


@torch.no_grad()
def read_parts(
    dictionary: Dictionary, rows: Sequence[GroupRows], places: Sequence[Place], recording: Recording, fixed_T: Tensor
) -> dict[HookPoint, Part]:
    """What `dictionary`, with the `rows` of its groups, gives, by their own outputs; in the recording's type."""
    found = {}
    for number, place in enumerate(places):
        latents = active(dictionary, rows[number], number, place, recording.sites[place.read], fixed_T)
        found[place.own] = own_part(dictionary, number, latents)
    return found


def own_part(dictionary: Dictionary, number: int, latents: ActiveLatents) -> Part:
    """What group `number` of `dictionary` gives: `latents`, and the bias and skip of the first output they write."""
    folded = latents.weights.folded
    scale, own = folded.output_scale, dictionary.places[number][1]
    bias_D = dictionary.b_dec.to(scale)[own] / scale + dictionary.output_mean.to(scale)[own]
    bias_D = bias_D[: len(folded.input_mean)]
    skip = raw_skip(dictionary, folded)
    if skip is not None:
        bias_D = bias_D - skip @ folded.input_mean
    return Part(latents, bias_D, skip)


@torch.no_grad()
def stand_in(parts: Mapping[HookPoint, Part], output: HookPoint, recording: Recording, fixed_T: Tensor) -> StandIn:
    """The stand-in for one output out of all parts; where none reads at its layer, all of it is error."""
    output_TD = recording.sites[output]
    part = parts.get(output) or _nothing(output, output_TD)
    rest_TD = output_TD
    if part.skip is not None:
        rest_TD = output_TD - recording.sites[part.latents.read] @ part.skip.T
    error_TD = rest_TD - part.bias_D
    for source in parts.values():
        if output in source.latents.writes:
            error_TD -= source.latents.written(output, error_TD)
    error_TD[fixed_T] = 0
    return StandIn(output, part.latents, part.bias_D, part.skip, error_TD, rest_TD[fixed_T])


def _nothing(output: HookPoint, output_TD: Tensor) -> Part:
    none, empty = output_TD.new_zeros(0, dtype=torch.int64), output_TD.new_zeros(0)
    weights = GroupWeights.none(Place(HookPoint(output.layer, "mlp_in"), (output,)), output_TD[0])
    return Part(ActiveLatents(weights, none, none, empty, empty), torch.zeros_like(output_TD[0]), None)
