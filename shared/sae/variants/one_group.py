"""Dictionaries of one group of latents: SAE, transcoder, crosscoder.

    z = W_enc (x~ - b_dec) + b_enc;  f = activation(z);  y^ = sum_i f_i W_dec[i] + b_dec

x~ is the input, y^ the output in the decoder's units; b_dec is taken off the input only where the config says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.groups import LatentGroup, draw_share, random_unit_rows
from shared.sae.latents import SparseLatents
from shared.sae.roles import Role
from shared.sae.variants.base import Dictionary, Picks


class OneGroup(LatentGroup, Dictionary):
    """A dictionary that is its own only group; random until it is learnt or loaded."""

    def __init__(
        self,
        config: DictionaryConfig,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
        held: range | None = None,
    ) -> None:
        """`held`: the latents held here, whose first weights are their rows of the whole's; None: all."""
        Dictionary.__init__(self, config, kernels=kernels, compute_dtype=compute_dtype)
        held = range(config.d_latent) if held is None else held
        self.make_held(held)
        self.b_dec = nn.Parameter(torch.zeros(self.widths.d_out))
        self.make_activation(config, len(held))
        self.make_normalisation()
        if not self.W_enc.is_meta:
            self.draw(held, generator)

    def make_held(self, held: range) -> None:
        """Register the matrices of these latents; their values are not set."""
        self.make_matrices(self.widths.d_in, self.widths.d_out, len(held))

    def draw(self, held: range, generator: torch.Generator | None) -> None:
        """First values of the matrices of these latents."""
        self.draw_rows(self.W_dec, held, generator)
        with torch.no_grad():
            if self.config.is_autoencoder:
                self.W_enc.copy_(self.W_dec)
            else:
                self.draw_rows(self.W_enc, held, generator)

    def draw_rows(self, W_FD: Tensor, held: range, generator: torch.Generator | None) -> None:
        """Random rows of unit norm, those of all latents that are held."""
        if len(held) == self.config.d_latent:
            random_unit_rows(W_FD, generator)
        else:
            draw_share(W_FD, held.start, self.config.d_latent, generator)

    @property
    def groups(self) -> tuple[LatentGroup, ...]:
        """Itself."""
        return (self,)

    @property
    def places(self) -> tuple[tuple[slice, slice], ...]:
        """All columns."""
        return ((slice(None), slice(None)),)

    def roles(self) -> dict[str, Role]:
        """Those of the group and of what all dictionaries have."""
        return {**self.group_roles(unit_norm_decoder=self.config.unit_norm_decoder), **super().roles()}

    def split(self, values_NK: Tensor, indices_NK: Tensor) -> list[Picks]:
        """All are of the one group."""
        return [(values_NK, indices_NK)]

    def decoded(self, values_NK: Tensor, indices_NK: Tensor, read: Given | None = None) -> Tensor:
        """Decode without b_dec, [N, D_out]."""
        return self.written(values_NK, indices_NK, read=read)

    def centred(self, normal_ND: Tensor) -> Tensor:
        """What the encoder multiplies, from the normalised input."""
        return normal_ND - self.b_dec if self.config.pre_bias else normal_ND

    @torch.no_grad()
    def encode(self, x: Tensor, *, return_all_features: bool = False) -> SparseLatents:
        """Active latents of raw activations x [..., D_in]; values and indices are [..., K]. No gradient.

        K is k under topk, else the number of latents of the fullest token. What a token gets does not depend on the
        others: under batchtopk the learnt threshold decides. `return_all_features`: also all positive pre-activations,
        [..., F], from which the activation selects (OpenSAE's ``all_features``).
        """
        normal, token_mean, token_scale = self.normalise(x)
        centred_ND = self.centred(normal.reshape(-1, self.widths.d_in))
        values, indices = self.fire(centred_ND)
        shape = (*x.shape[:-1], values.shape[-1])
        features = None
        if return_all_features:
            features = torch.relu(F.linear(centred_ND, self.W_enc, self.b_enc)).view(*x.shape[:-1], -1)
        return SparseLatents(
            values.view(shape),
            indices.view(shape),
            token_mean,
            token_scale,
            self.skip(normal),
            read=None if self.writes_rows else normal,
            all_features=features,
        )

    @torch.no_grad()
    def decode(self, latents: SparseLatents) -> Tensor:
        """Reconstruction [..., D_out] of what is written, in the units of raw activations. No gradient."""
        width = latents.values.shape[-1]
        y_hat_ND = self.decoded(
            latents.values.reshape(-1, width).to(self.b_dec.dtype),
            latents.indices.reshape(-1, width),
            None if latents.read is None else latents.read.reshape(-1, self.widths.d_in),
        )
        y_hat = (y_hat_ND + self.b_dec).view(*latents.values.shape[:-1], self.widths.d_out)
        if latents.skipped is not None:
            y_hat = y_hat + latents.skipped
        return self.denormalise(y_hat, latents.token_mean, latents.token_scale)
