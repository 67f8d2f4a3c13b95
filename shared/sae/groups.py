"""A group of latents: one encoder, one decoder, one activation.

Shapes: D_in sum of the widths that the group reads, D_out of those that it writes, F latents held here.
"""

import torch
from torch import Tensor, nn

from shared.kernels import Compute
from shared.sae.activations import ACTIVATIONS, Activation
from shared.sae.config import DictionaryConfig
from shared.sae.roles import Role


class LatentGroup(nn.Module):
    """Latents that share what they read and what they write: ``f = activation(W_enc x + b_enc)``, ``y = f W_dec``.

    W_enc is [F, D_in] and W_dec [F, D_out], one row per latent: a latent's row in W_dec lies over all sites that the
    group writes, side by side. Parameters are float32.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    activation: Activation
    kernels: str
    compute_dtype: str

    @property
    def compute(self) -> Compute:
        """`kernels` and `compute_dtype` as the operations take them."""
        return Compute(self.kernels, self.compute_dtype)

    def make_matrices(self, d_in: int, d_out: int, num_latents: int) -> None:
        """Register the group's own parameters; their values are not set."""
        self.W_enc = nn.Parameter(torch.empty(num_latents, d_in))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_out))

    def make_activation(self, config: DictionaryConfig, num_latents: int) -> None:
        """Register the activation that the config names."""
        self.activation = ACTIVATIONS[config.activation](config, num_latents)

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
    draw_in_blocks(W_FD, generator)


def draw_in_blocks(W_FD: Tensor, generator: torch.Generator) -> None:
    """``random_unit_rows`` with no more than BLOCK_ROWS rows on the generator's device."""
    for block_RD in W_FD.split(BLOCK_ROWS):
        drawn_RD = torch.empty(block_RD.shape, device=generator.device).normal_(generator=generator)
        block_RD.copy_(drawn_RD.div_(drawn_RD.norm(dim=1, keepdim=True)))
