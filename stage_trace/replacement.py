"""The local replacement model of one prompt: what stands in for each MLP's output, position by position.

    mlp_out_l[p] = sum_i f_i d_i + b_l + W_skip,l x_l[p] + error_l[p]       p: free positions
    mlp_out_l[p] = rest_l[p] + W_skip,l x_l[p]                              p: positions that no dictionary was taught

f_i are active latents, d_i their decoder rows, all in the units of raw activations: a dictionary's normalisation is
folded into its weights. Everything but the skip, which is connected everywhere, is a leaf of the graph; f_i is also a
row, since it reads the stream:

    f_i = e_i . x_l[p] + c_i

Only the rows of active latents are read from a dictionary's file, never all of W_dec.
Shapes: N active latents, T positions, D width of the stream, L layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.sae.activations import Gated
from shared.sae.sites import Sites
from shared.sae.variants import Dictionary
from shared.sae.variants.base import per_column

READABLE = ("mlp_in", "resid_mid", "resid_pre")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dictionary reads and which MLP it stands in for."""

    read: HookPoint
    layer: int

    @classmethod
    def of(cls, sites: Sites | None, name: str) -> "Place":
        """From the sites it records; raises GranaryError, naming `name`, for anything but an MLP's stand-in."""
        if sites is None:
            raise GranaryError(f"{name} does not record where it reads and writes: graphs need a transcoder that does")
        if len(sites.reads) != 1 or len(sites.writes) != 1:
            raise GranaryError(f"{name} has {sites}: graphs know dictionaries that read one site and write one")
        read, write = HookPoint.parse(sites.reads[0]), HookPoint.parse(sites.writes[0])
        if write.site != "mlp_out" or read.site not in READABLE or read.layer != write.layer:
            raise GranaryError(
                f"{name} has {sites}: graphs need transcoders of an MLP, such as layers.2.mlp_in -> layers.2.mlp_out"
            )
        return cls(read, write.layer)


@dataclass(frozen=True, slots=True)
class LayerLatents:
    """The active latents of one dictionary, sorted by position and latent, in raw units."""

    read: HookPoint
    position_N: Tensor
    latent_N: Tensor
    value_N: Tensor
    constant_N: Tensor
    """What a value holds beside what it reads: ``value = encoder . x + constant``."""
    encoder_ND: Tensor
    decoder_ND: Tensor

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
    """What stands in for the MLP of one layer."""

    latents: LayerLatents
    bias_D: Tensor
    skip: Tensor | None
    """W_skip [D, D] in raw units, from what `latents` reads."""
    error_TD: Tensor
    """0 at fixed positions."""
    rest_TD: Tensor
    """What the MLP adds beside the skip; 0 at free positions."""


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


def read_sites(places: Sequence[Place]) -> list[HookPoint]:
    """What a recording must hold for `replace`."""
    return [place.read for place in places]


def check_places(places: Sequence[tuple[str, Place]], num_layers: int) -> None:
    """Raise GranaryError where two dictionaries stand in for one MLP, or one for an MLP that the model lacks."""
    taken: dict[int, str] = {}
    for name, place in places:
        if place.layer >= num_layers:
            raise GranaryError(f"{name} stands in for layer {place.layer}, and the model has {num_layers} layers")
        if place.layer in taken:
            raise GranaryError(f"{taken[place.layer]} and {name} both write layers.{place.layer}.mlp_out: give one")
        taken[place.layer] = name


@torch.no_grad()
def replace_layer(dictionary: Dictionary, place: Place, recording: Recording, fixed_T: Tensor) -> LayerStandIn:
    """The stand-in that `dictionary` is for the MLP of its layer; computed in the type of the recording."""
    x_TD = recording.sites[place.read]
    output_TD = recording.mlp_out(place.layer)
    latents = active(dictionary, place.read, x_TD, fixed_T)
    folded = Folded.of(dictionary, x_TD)
    bias_D = dictionary.b_dec.to(x_TD) / folded.output_scale + dictionary.output_mean.to(x_TD)
    skip: Tensor | None = getattr(dictionary, "W_skip", None)
    skip_DD = None
    if skip is not None:
        skip_DD = skip.to(x_TD) * folded.input_scale / folded.output_scale[..., None]
        bias_D = bias_D - skip_DD @ folded.input_mean
    rest_TD = output_TD if skip_DD is None else output_TD - x_TD @ skip_DD.T
    made_TD = bias_D.expand_as(output_TD).clone()
    made_TD.index_add_(0, latents.position_N, latents.value_N[:, None] * latents.decoder_ND)
    error_TD = (rest_TD - made_TD).masked_fill(fixed_T[:, None], 0)
    return LayerStandIn(latents, bias_D, skip_DD, error_TD, rest_TD.masked_fill(~fixed_T[:, None], 0))


@torch.no_grad()
def without_dictionary(layer: int, recording: Recording, fixed_T: Tensor) -> LayerStandIn:
    """For a layer that no dictionary stands in for: its whole output is error."""
    output_TD = recording.mlp_out(layer)
    D = output_TD.shape[1]
    none, rows = fixed_T.new_zeros(0, dtype=torch.int64), output_TD.new_zeros(0, D)
    nothing = LayerLatents(HookPoint(layer, "mlp_in"), none, none, rows.sum(1), rows.sum(1), rows, rows)
    error_TD, rest_TD = output_TD.masked_fill(fixed_T[:, None], 0), output_TD.masked_fill(~fixed_T[:, None], 0)
    return LayerStandIn(nothing, output_TD.new_zeros(D), None, error_TD, rest_TD)


def active(dictionary: Dictionary, read: HookPoint, x_TD: Tensor, fixed_T: Tensor) -> LayerLatents:
    """Which latents fire, by the dictionary itself; their values from the folded rows, in the type of x."""
    (group,) = dictionary.groups
    indices_TK = dictionary.encode(x_TD).indices
    position_N, slot_N = torch.nonzero((indices_TK >= 0) & ~fixed_T[:, None], as_tuple=True)
    latent_N = indices_TK[position_N, slot_N]
    order = torch.argsort(position_N * group.num_latents + latent_N)
    position_N, latent_N = position_N[order], latent_N[order]

    folded = Folded.of(dictionary, x_TD)
    encoder_ND = group.W_enc[latent_N].to(x_TD) * folded.input_scale
    bias_N = group.b_enc[latent_N].to(x_TD)
    if isinstance(group.activation, Gated):
        gain_N = torch.exp(group.activation.r_mag[latent_N].to(x_TD))
        encoder_ND, bias_N = encoder_ND * gain_N[:, None], group.activation.b_mag[latent_N].to(x_TD)
    constant_N = bias_N - encoder_ND @ folded.input_mean
    value_N = (encoder_ND * x_TD[position_N]).sum(1) + constant_N
    decoder_ND = group.W_dec[latent_N].to(x_TD) / folded.output_scale
    return LayerLatents(read, position_N, latent_N, value_N, constant_N, encoder_ND, decoder_ND)


@dataclass(frozen=True, slots=True)
class Folded:
    """The normalisation of both sides, in the type of the stream; one scale per column."""

    input_mean: Tensor
    input_scale: Tensor
    output_scale: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, like: Tensor) -> "Folded":
        """A dictionary's, whose input is as it is where it has no normalisation."""
        widths = dictionary.widths
        output_scale = per_column(dictionary.output_scale.to(like), widths.writes)
        if dictionary.config.normalisation == "none":
            return cls(like.new_zeros(widths.d_in), like.new_ones(()), output_scale)
        return cls(
            dictionary.input_mean.to(like), per_column(dictionary.input_scale.to(like), widths.reads), output_scale
        )
