"""Schema of the config group ``sae``; the values are in ``conf/sae``."""

from dataclasses import dataclass, fields

from omegaconf import MISSING

from shared.errors import GranaryError
from shared.sae.config import SAEConfig


@dataclass(kw_only=True)
class SAESchema:
    """Group ``sae``: the fields of ``SAEConfig``, with the width given by ``expansion`` or ``d_latent``."""

    k: int = MISSING
    """Active latents per token."""
    expansion: float = MISSING
    """Latents per dimension of the activations: F = expansion * d_model."""
    d_latent: int | None = None
    """Number of latents; overrides expansion."""
    activation: str = MISSING
    """Which latents fire."""
    normalisation: str = MISSING
    """none, scale, centre_scale or layer_norm."""
    shift_back: bool = MISSING
    """Undo layer_norm on the reconstruction; false is for SAEs loaded from elsewhere."""
    pre_bias: bool = MISSING
    """Subtract b_dec before the encoder."""
    loss: str = MISSING
    """fvu or fvu_per_dim."""
    auxk_alpha: float = MISSING
    """Weight of the AuxK loss on dead latents; 0 turns it off."""
    auxk_k: int | None = None
    """Dead latents per token in the AuxK loss; null: d_model / 2."""
    multi_topk_weight: float = MISSING
    """Weight of the loss with multi_topk_factor * k latents; 0 turns it off."""
    multi_topk_factor: int = MISSING
    """How many times k the Multi-TopK loss uses."""
    dead_after_tokens: int = MISSING
    """A latent without a nonzero activation for this many tokens is dead."""
    bias_init: str = MISSING
    """What b_dec starts at: zero, mean or geometric_median."""

    def to_config(self, d_model: int) -> SAEConfig:
        """The config for activations of width `d_model`; raises GranaryError when it makes no sense."""
        if self.d_latent is None and not self.expansion > 0:
            raise GranaryError(f"sae.expansion={self.expansion}: must be positive")
        d_latent = self.d_latent if self.d_latent is not None else round(self.expansion * d_model)
        same = {field.name: getattr(self, field.name) for field in fields(self)}
        del same["expansion"], same["d_latent"]
        return SAEConfig(d_model=d_model, d_latent=d_latent, **same)
