"""A group of latents: one encoder, one decoder, one activation.

Shapes: D_in sum of the widths that the group reads, D_out of those that it writes, F latents held here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shared.kernels import (
    Compute,
    PairGradient,
    PairOrder,
    attach_encoder,
    decode,
    product,
    sparse_decode,
    take_rows,
)
from shared.sae.activations import ACTIVATIONS, Activation, Encoder
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.roles import Role


@dataclass
class ComputeChoice:
    """How a dictionary and all its groups compute; may be changed."""

    kernels: str
    compute_dtype: str


class Computing(nn.Module):
    """What a dictionary and a group of latents share of it."""

    choice: ComputeChoice

    @property
    def kernels(self) -> str:
        """auto, triton, torch or reference."""
        return self.choice.kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        self.choice.kernels = kernels

    @property
    def compute_dtype(self) -> str:
        """Type of the encoder's product."""
        return self.choice.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, compute_dtype: str) -> None:
        self.choice.compute_dtype = compute_dtype

    @property
    def compute(self) -> Compute:
        """Both as the operations take them."""
        return Compute(self.kernels, self.compute_dtype)


class LatentGroup(Computing):
    """Latents that share what they read and what they write: ``f = activation(W_enc x + b_enc)``, ``y = f W_dec``.

    W_enc is [F, D_in] and W_dec [F, D_out], one row per latent: a latent's row in W_dec lies over all sites that the
    group writes, side by side. Parameters are float32.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    activation: Activation
    writes_rows: ClassVar[bool] = True
    """Whether a latent adds its row of W_dec times its value; else it is a map of what was read, and there is none."""
    is_two_rows: ClassVar[bool] = True
    """Whether a latent is a row that what is read is multiplied by, and a row that it adds, and nothing more."""

    def __init__(self, choice: ComputeChoice) -> None:
        """A group of a dictionary of several, which makes its matrices and activation."""
        super().__init__()
        self.choice = choice

    def make_matrices(self, d_in: int, d_out: int, num_latents: int) -> None:
        """Register the group's own parameters; their values are not set."""
        self.make_encoder(d_in, num_latents)
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_out))

    def make_encoder(self, d_in: int, num_latents: int) -> None:
        """Those of the encoder alone."""
        self.W_enc = nn.Parameter(torch.empty(num_latents, d_in))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))

    def make_activation(self, config: DictionaryConfig, num_latents: int) -> None:
        """Register the activation that the config names."""
        self.activation = ACTIVATIONS[config.activation](config, num_latents)
        self.has_unit_rows = config.unit_norm_decoder

    def decoder_norm(self) -> Tensor | None:
        """Norms [F] of the decoder's rows, which weigh the penalties, with gradient; None where they are 1."""
        return None if self.has_unit_rows else self.W_dec.norm(dim=1)

    def choice_norm(self) -> Tensor | None:
        """What weighs each latent where k are chosen, [F]; None: nothing."""
        return None

    def encoder(self) -> Encoder:
        """The encoder as the choice sees it, with those weights."""
        norm_F = self.choice_norm()
        if norm_F is None:
            return Encoder(self.W_enc, self.b_enc, self.compute, None)
        with torch.no_grad():
            return Encoder(self.W_enc * norm_F[:, None], self.b_enc * norm_F, self.compute, norm_F)

    def fire(self, centred: Given) -> tuple[Tensor, Tensor]:
        """Inference: latents [N, K] of what the encoder multiplies, and their int64 indices, -1 for padding."""
        encoder = self.encoder()
        values_NK, indices_NK = self.activation.encode(encoder, centred)
        return encoder.unweighted(values_NK, indices_NK), indices_NK

    def preactivations(self, given: Given) -> Tensor:
        """z [N, F] of all latents, with every gradient."""
        assert isinstance(given, Tensor)
        return product(given, self.W_enc.T, self.b_enc, compute=self.compute)

    def preactivations_of(self, latents_R: Tensor, given: Given) -> Tensor:
        """z [N, R] of distinct latents, with gradients for what they alone have."""
        assert isinstance(given, Tensor)
        return product(given, self.W_enc[latents_R].T, self.b_enc[latents_R], compute=self.compute)

    def attach(
        self,
        given: Given,
        pre_bias: Tensor | None,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None,
    ) -> Tensor:
        """Chosen z as a differentiable function of the encoder; see ``attach_encoder``."""
        assert isinstance(given, Tensor)
        return attach_encoder(
            given, pre_bias, self.W_enc, self.b_enc, values_NK, indices_NK, order, compute=self.compute, sink=sink
        )

    def decoder_rows(self, latents_R: Tensor, sink: PairGradient | None = None) -> Tensor:
        """Rows [R, D_out] of the decoder, of distinct latents; with a `sink` its gradient goes there."""
        return take_rows(self.W_dec, latents_R, sink)

    def write(
        self,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None = None,
        *,
        read: Given | None = None,
    ) -> Tensor:
        """What picks decode to, [N, D_out], with gradients for the values and the decoder, or its `sink`.

        `read` is what the encoder was given, for latents that are maps of it.
        """
        return sparse_decode(values_NK, indices_NK, self.W_dec, order, compute=self.compute, sink=sink)

    def write_all(self, f_NF: Tensor, read: Given, *, frozen: bool = False) -> Tensor:
        """The same of every latent; `frozen`: without a gradient for the decoder."""
        return product(f_NF, self.W_dec.detach() if frozen else self.W_dec, compute=self.compute)

    def write_some(self, f_NR: Tensor, latents_R: Tensor, read: Given) -> Tensor:
        """``write_all`` of some latents, which are distinct."""
        return product(f_NR, self.W_dec[latents_R], compute=self.compute)

    def written(self, values_NK: Tensor, indices_NK: Tensor, *, read: Given | None = None) -> Tensor:
        """What picks decode to, without gradient."""
        return decode(values_NK, indices_NK, self.W_dec, kernels=self.kernels)

    def after_step(self) -> None:
        """Put back, after an optimiser's step, what it holds fixed beside rows of unit norm."""

    @property
    def num_latents(self) -> int:
        """Latents held here."""
        return self.W_enc.shape[0]

    def group_roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """Roles of the group's parameters and buffers, by name."""
        return {
            "W_enc": Role(latent_axis=0, from_pairs=True, is_matrix=True),
            "b_enc": Role(latent_axis=0, rate="bias"),
            "W_dec": Role(latent_axis=0, rate="decoder", from_pairs=True, is_matrix=True, unit_rows=unit_norm_decoder),
            **{f"activation.{name}": role for name, role in self.activation.roles().items()},
        }


# Rows drawn at a time where they are not drawn in place. A multiple of 16: normal_ draws so many values at once, so
# that blocks get the bits that the whole would.
BLOCK_ROWS = 4096


@torch.no_grad()
def random_unit_rows(W_FD: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill `W_FD` in place with rows uniform on the unit sphere.

    The same bits wherever W is: they are drawn on the generator's device, block by block where that is another.
    """
    if generator is None or generator.device == W_FD.device:
        W_FD.normal_(generator=generator)
        W_FD.div_(W_FD.norm(dim=1, keepdim=True))
        return
    draw_share(W_FD, 0, len(W_FD), generator)


@torch.no_grad()
def draw_share(W_SD: Tensor, first: int, rows: int, generator: torch.Generator | None) -> None:
    """Fill `W_SD` with what ``random_unit_rows`` gives the rows from `first` on of a matrix of `rows`.

    All are drawn, in their order, with no more than BLOCK_ROWS at a time on the generator's device.
    """
    for start, drawn_RD in unit_blocks(rows, W_SD.shape[1], generator):
        low, high = max(start, first), min(start + len(drawn_RD), first + len(W_SD))
        if low < high:
            W_SD[low - first : high - first] = drawn_RD[low - start : high - start]


def unit_blocks(rows: int, columns: int, generator: torch.Generator | None) -> Iterator[tuple[int, Tensor]]:
    """The rows that ``random_unit_rows`` fills a matrix of this shape with, block by block: first row, and [R, D]."""
    device = None if generator is None else generator.device
    for start in range(0, rows, BLOCK_ROWS):
        size = min(BLOCK_ROWS, rows - start)
        drawn_RD = torch.empty(size, columns, device=device).normal_(generator=generator)
        yield start, drawn_RD.div_(drawn_RD.norm(dim=1, keepdim=True))
