"""The skip transcoder (Paulo, Shabalin and Belrose 2025, 2501.18823): a transcoder beside a linear map.

    f = activation(W_enc x~ + b_enc);   y^ = denormalise(sum_i f_i W_dec[i] + b_dec + W_skip x~)

The map takes what is linear in the layer, so that the latents need not spend themselves on it. The reconstruction is
the whole of y^, in ``decode`` as in ``forward``: latents carry their token's W_skip x~.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.kernels import product
from shared.sae.config import DictionaryConfig
from shared.sae.latents import SparseLatents
from shared.sae.roles import Role
from shared.sae.variants.transcoder import Transcoder, TranscoderConfig


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """A transcoder with a linear map beside it."""

    kind: ClassVar[str] = "skip_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_autoencoder:
            raise GranaryError(
                f"a skip from {self.sites} to itself would copy it and leave the latents nothing: use variant=sae"
            )


class SkipTranscoder(Transcoder):
    """A skip transcoder as its config describes it; the map is zero until it is learnt or loaded."""

    config_class: ClassVar[type[DictionaryConfig]] = SkipTranscoderConfig
    config: SkipTranscoderConfig

    def __init__(
        self,
        config: DictionaryConfig,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
        held: range | None = None,
    ) -> None:
        super().__init__(config, kernels=kernels, compute_dtype=compute_dtype, generator=generator, held=held)
        self.W_skip = nn.Parameter(torch.zeros(self.widths.d_out, self.widths.d_in))

    def roles(self) -> dict[str, Role]:
        """Every process holds all of W_skip, which has no row per latent."""
        return {**super().roles(), "W_skip": Role(latent_axis=None)}

    def skip(self, normal: Tensor) -> Tensor:
        """``W_skip x~``, [..., D_out]."""
        y_ND = product(normal.reshape(-1, self.widths.d_in), self.W_skip.T, compute=self.compute)
        return y_ND.view(*normal.shape[:-1], self.widths.d_out)

    def decode(self, latents: SparseLatents) -> Tensor:
        """The whole reconstruction; raises GranaryError for latents without their tokens' skip, as ``encode`` gives."""
        if latents.skipped is None:
            raise GranaryError("a skip transcoder needs what its tokens' skip gives, as encode returns it in .skipped")
        return super().decode(latents)
