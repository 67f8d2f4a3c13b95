"""What a tensor of a dictionary is, so that optimiser, layouts, export and estimate need not know its name."""

from dataclasses import dataclass
from typing import Literal

Rate = Literal["encoder", "decoder", "bias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """How a parameter or buffer takes part in learning and in being spread over processes."""

    latent_axis: int | None
    """The axis along which latents lie, each with as much as every other or as its rank says, which a layout may cut;
    None: every process holds the whole tensor."""
    unit_rows: bool = False
    """Each latent's row has unit norm after every step."""
    rate: Rate = "encoder"
    """Which learning rate: the plain one (encoder), times optim.decoder_factor, or times optim.bias_factor."""
    from_pairs: bool = False
    """Its gradient is a sum over (token, latent) pairs, which an optimiser may read without the dense tensor."""
    is_matrix: bool = False
    """One row per latent with a column per feature: what Muon orthogonalises and Adam8bit keeps in 8 bits."""
    learnt: bool = True
    """Changes from step to step, hence is averaged where averages are kept; False: fixed at the start."""
