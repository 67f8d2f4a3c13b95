"""The rows of a group of latents in the units of raw activations.

Rows are not held: whoever needs them reads them from the dictionary's file or from a dictionary in memory.
Shapes: F latents of the group, n of those asked for, D width of the stream.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from shared.sae.activations import Gated
from shared.sae.groups import LatentGroup
from shared.sae.variants import Dictionary
from shared.sae.variants.base import per_column
from stage_trace.places import Place


class GroupRows(Protocol):
    """Rows of one group of a dictionary, in its own units and type."""

    def encoder(self, latents: Tensor) -> Tensor:
        """Rows [n, D] of W_enc."""
        ...

    def decoder(self, latents: Tensor, columns: slice) -> Tensor:
        """Some columns of rows of W_dec, [n, width]."""
        ...


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows of the matrices of a group in memory."""

    group: LatentGroup

    def encoder(self, latents: Tensor) -> Tensor:
        """Take rows of the parameter."""
        return self.group.W_enc[latents]

    def decoder(self, latents: Tensor, columns: slice) -> Tensor:
        """Take rows of the parameters, which may be tied."""
        return self.group.decoder_rows(latents)[:, columns]


class NoRows:
    """What stands for the rows of a layer without a dictionary."""

    def encoder(self, latents: Tensor) -> Tensor:
        raise IndexError(f"there is no latent {latents.tolist()}")

    def decoder(self, latents: Tensor, columns: slice) -> Tensor:
        raise IndexError(f"there is no latent {latents.tolist()}")


@dataclass(frozen=True, slots=True)
class Folded:
    """The normalisation of what a group reads and writes, in the type of the stream; one scale per column."""

    input_mean: Tensor
    input_scale: Tensor
    output_scale: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, number: int, like: Tensor) -> "Folded":
        """Fold group `number`, whose input stays as it is where the dictionary has no normalisation."""
        reads, writes = dictionary.places[number]
        widths = dictionary.widths
        output_scale = per_column(dictionary.output_scale.to(like), widths.writes).expand(widths.d_out)[writes]
        mean, scale = dictionary.input_mean.to(like), per_column(dictionary.input_scale.to(like), widths.reads)
        if dictionary.config.normalisation == "none":
            mean, scale = torch.zeros_like(mean), torch.ones_like(scale)
        # Copies: a view of one small tensor would keep all of a mapped file in memory.
        return cls(mean[reads].clone(), scale.expand(widths.d_in)[reads].clone(), output_scale.clone())


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """Encoder and decoder rows of a group, its dictionary's normalisation folded into them."""

    place: Place
    rows: GroupRows
    folded: Folded
    gain_F: Tensor | None = None
    """A factor of each encoder row, of a gated dictionary."""

    @classmethod
    def of(cls, dictionary: Dictionary, rows: GroupRows, number: int, place: Place, like: Tensor) -> "GroupWeights":
        """Make those of group `number`, in the type of `like`."""
        activation = dictionary.groups[number].activation
        gain_F = torch.exp(activation.r_mag.to(like)) if isinstance(activation, Gated) else None
        return cls(place, rows, Folded.of(dictionary, number, like), gain_F)

    @classmethod
    def none(cls, place: Place, like_D: Tensor) -> "GroupWeights":
        """Make those of a layer without a dictionary."""
        ones_D = torch.ones_like(like_D)
        return cls(place, NoRows(), Folded(torch.zeros_like(like_D), ones_D, ones_D))

    def encoder(self, latents: Tensor) -> Tensor:
        """Encoder rows [n, D]."""
        scale_D = self.folded.input_scale
        rows_nD = self.rows.encoder(latents).to(scale_D) * scale_D
        return rows_nD if self.gain_F is None else rows_nD * self.gain_F[latents, None]

    def decoder(self, output: HookPoint, latents: Tensor) -> Tensor:
        """Decoder rows [n, D] for one of the outputs that the group writes."""
        D, at = len(self.folded.input_scale), self.place.writes.index(output)
        columns, scale = slice(at * D, (at + 1) * D), self.folded.output_scale
        return self.rows.decoder(latents, columns).to(scale) / scale[columns]


def raw_skip(dictionary: Dictionary, folded: Folded) -> Tensor | None:
    """W_skip [D, D] between raw activations, where the dictionary has one."""
    skip: Tensor | None = getattr(dictionary, "W_skip", None)
    return None if skip is None else skip.to(folded.input_scale) * folded.input_scale / folded.output_scale[..., None]
