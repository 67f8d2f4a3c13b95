"""The local replacement model of one prompt: what stands in for each MLP's output, position by position.

    mlp_out_t[p] = sum_i f_i d_i,t + b_t + W_skip,t x_t[p] + error_t[p]       p: free positions
    mlp_out_t[p] = rest_t[p] + W_skip,t x_t[p]                                p: positions that no dictionary was taught

f_i are active latents, d_i,t their decoder rows for layer t, all in the units of raw activations: a dictionary's
normalisation is folded into its weights. A transcoder's latents write the MLP of their own layer, those of a CLT the
later ones too. Everything but the skip, which is connected everywhere, is a leaf of the graph; f_i is also a row, since
it reads the stream:

    f_i = e_i . x_l[p] + c_i

Encoder and decoder rows of active latents are not held: whoever needs them reads them, position by position.
Shapes: N active latents, n of a position or of a batch, T positions, D width of the stream, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.sae.activations import Gated
from shared.sae.config import DictionaryConfig
from shared.sae.groups import LatentGroup
from shared.sae.variants import Dictionary
from stage_trace.group_weights import GroupRows, GroupWeights, Place, raw_skip

READABLE = ("mlp_in", "resid_mid", "resid_pre")


def places_of(config: DictionaryConfig, name: str) -> tuple[Place, ...]:
    """Return those of each group. Raises GranaryError, naming `name`, for anything but stand-ins of MLPs."""
    sites = config.sites
    if sites is None:
        raise GranaryError(f"{name} does not record where it reads and writes: graphs need a transcoder that does")
    if not config.writes_rows:
        raise GranaryError(
            f"{name} is a {config.kind}, whose latents are maps of what they read: graphs need latents that write a row"
        )
    if config.num_groups > 1 and not config.follows_depth:
        raise GranaryError(
            f"{name} takes the k largest of all layers, so that later ones decide what earlier ones fire: use batchtopk"
        )
    groups = config.num_groups
    if len(sites.reads) == groups == len(sites.writes):
        reads = [HookPoint.parse(one) for one in sites.reads]
        writes = [HookPoint.parse(one) for one in sites.writes]
        layers = [one.layer for one in writes]
        in_order = [one.layer for one in reads] == layers == sorted(set(layers))
        if in_order and all(one.site in READABLE for one in reads) and {one.site for one in writes} == {"mlp_out"}:
            return tuple(Place(read, tuple(layers[number:])) for number, read in enumerate(reads))
    raise GranaryError(
        f"{name} has {sites}: graphs need transcoders of MLPs, such as layers.2.mlp_in -> layers.2.mlp_out, or a CLT"
    )


@dataclass(frozen=True, slots=True)
class LayerLatents:
    """The active latents that read at one layer, sorted by position and latent; rows and values in raw units."""

    weights: GroupWeights
    position_N: Tensor
    latent_N: Tensor
    value_N: Tensor
    constant_N: Tensor
    """What a value holds beside what it reads: ``value = encoder . x + constant``."""

    @property
    def read(self) -> HookPoint:
        """Where they read."""
        return self.weights.place.read

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose MLPs they write."""
        return self.weights.place.layers

    def encoder(self, some: Tensor | slice) -> Tensor:
        """Encoder rows [n, D] of `some` of them."""
        return self.weights.encoder(self.latent_N[some])

    def decoder(self, layer: int, some: Tensor | slice) -> Tensor:
        """Decoder rows [n, D] of `some` of them for the MLP of `layer`, one of `layers`."""
        return self.weights.decoder(layer, self.latent_N[some])

    def written(self, layer: int, like_TD: Tensor) -> Tensor:
        """[T, D]: what they add to the MLP of `layer`, all of them at every position."""
        written_TD = torch.zeros_like(like_TD)
        for position, some in self.by_position():
            written_TD[position] = self.value_N[some] @ self.decoder(layer, some)
        return written_TD

    def by_position(self) -> Iterator[tuple[int, slice]]:
        """Every position with latents, and where they lie."""
        counts = torch.bincount(self.position_N).tolist()
        start = 0
        for position, count in enumerate(counts):
            if count:
                yield position, slice(start, start + count)
            start += count


@dataclass(frozen=True, slots=True)
class LayerStandIn:
    """What stands in for the MLP of one layer, beside latents, and the latents that read there."""

    latents: LayerLatents
    bias_D: Tensor
    skip: Tensor | None
    """W_skip [D, D] in raw units, from what `latents` reads."""
    error_TD: Tensor
    """0 at fixed positions."""
    rest_PD: Tensor
    """What the MLP adds beside the skip at each of the fixed positions."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """All layers of one prompt."""

    layers: list[LayerStandIn]
    fixed_T: Tensor
    """bool [T]: positions at which an MLP's output is one leaf."""

    @property
    def num_latents(self) -> int:
        """Active latents of all layers."""
        return sum(len(layer.latents.value_N) for layer in self.layers)

    @property
    def free(self) -> Tensor:
        """bool [T]: the other positions."""
        return ~self.fixed_T


@dataclass(frozen=True, slots=True)
class Part:
    """What one group of a dictionary gives: its latents, and the bias and skip of its own layer's MLP."""

    latents: LayerLatents
    bias_D: Tensor
    skip: Tensor | None


def check_places(places: Sequence[tuple[str, Place]], num_layers: int) -> None:
    """Raise GranaryError where two dictionaries stand in for one MLP, or one for an MLP that the model lacks."""
    taken: dict[int, str] = {}
    for name, place in places:
        layer = place.layers[0]
        if place.layers[-1] >= num_layers:
            raise GranaryError(f"{name} stands in for layer {place.layers[-1]}, and the model has {num_layers} layers")
        if layer in taken:
            raise GranaryError(f"{taken[layer]} and {name} both write layers.{layer}.mlp_out: give one")
        taken[layer] = name


@torch.no_grad()
def read_parts(
    dictionary: Dictionary, rows: Sequence[GroupRows], places: Sequence[Place], recording: Recording, fixed_T: Tensor
) -> dict[int, Part]:
    """What `dictionary`, with the `rows` of its groups, gives to each layer that it reads; in the recording's type."""
    found = {}
    for number, place in enumerate(places):
        latents = active(dictionary, rows[number], number, place, recording.sites[place.read], fixed_T)
        found[place.layers[0]] = own_part(dictionary, number, latents)
    return found


def own_part(dictionary: Dictionary, number: int, latents: LayerLatents) -> Part:
    """What group `number` of `dictionary` gives: `latents`, and the bias and skip of the first MLP that they write."""
    folded = latents.weights.folded
    scale, own = folded.output_scale, dictionary.places[number][1]
    bias_D = dictionary.b_dec.to(scale)[own] / scale + dictionary.output_mean.to(scale)[own]
    bias_D = bias_D[: len(folded.input_mean)]
    skip = raw_skip(dictionary, folded)
    if skip is not None:
        bias_D = bias_D - skip @ folded.input_mean
    return Part(latents, bias_D, skip)


@torch.no_grad()
def stand_in(parts: Mapping[int, Part], layer: int, recording: Recording, fixed_T: Tensor) -> LayerStandIn:
    """The stand-in for one MLP out of all parts; where none reads there, the whole output is error."""
    output_TD = recording.mlp_out(layer)
    part = parts.get(layer) or _nothing(layer, output_TD)
    rest_TD = output_TD
    if part.skip is not None:
        rest_TD = output_TD - recording.sites[part.latents.read] @ part.skip.T
    error_TD = rest_TD - part.bias_D
    for source in parts.values():
        if layer in source.latents.layers:
            error_TD -= source.latents.written(layer, error_TD)
    error_TD[fixed_T] = 0
    return LayerStandIn(part.latents, part.bias_D, part.skip, error_TD, rest_TD[fixed_T])


def _nothing(layer: int, output_TD: Tensor) -> Part:
    none, empty = output_TD.new_zeros(0, dtype=torch.int64), output_TD.new_zeros(0)
    weights = GroupWeights.none(Place(HookPoint(layer, "mlp_in"), (layer,)), output_TD[0])
    return Part(LayerLatents(weights, none, none, empty, empty), torch.zeros_like(output_TD[0]), None)


def active(
    dictionary: Dictionary, rows: GroupRows, number: int, place: Place, x_TD: Tensor, fixed_T: Tensor
) -> LayerLatents:
    """Which latents of a group fire, by the group itself; their values from the folded rows, in the type of x."""
    group: LatentGroup = dictionary.groups[number]
    weights = GroupWeights.of(dictionary, rows, number, place, x_TD)
    folded = weights.folded
    dtype = dictionary.b_dec.dtype
    normal_TD = (x_TD.to(dtype) - folded.input_mean.to(dtype)) * folded.input_scale.to(dtype)
    _, indices_TK = group.fire(normal_TD)
    position_N, slot_N = torch.nonzero((indices_TK >= 0) & ~fixed_T[:, None], as_tuple=True)
    latent_N = indices_TK[position_N, slot_N]
    order = torch.argsort(position_N * group.num_latents + latent_N)
    position_N, latent_N = position_N[order], latent_N[order]

    activation = group.activation
    constant_F = activation.b_mag if isinstance(activation, Gated) else group.b_enc
    constant_N = constant_F[latent_N].to(x_TD).clone()
    value_N = torch.empty_like(constant_N)
    found = LayerLatents(weights, position_N, latent_N, value_N, constant_N)
    for position, some in found.by_position():
        encoder_nD = found.encoder(some)
        constant_N[some] -= encoder_nD @ folded.input_mean
        value_N[some] = (encoder_nD * x_TD[position]).sum(1) + constant_N[some]
    return found
