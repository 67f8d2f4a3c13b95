"""What a unit of each latent adds to what is written: rows of the decoder, in its own units and in raw activations'."""

import torch
from torch import Tensor

from shared.sae.variants import Dictionary
from shared.sae.variants.base import per_column


def decoder_rows(dictionary: Dictionary) -> Tensor:
    """One row per latent over all that is written, [F, D]; 0 where its group does not write."""
    if len(dictionary.groups) == 1:
        return dictionary.groups[0].W_dec.detach()
    rows = []
    for group, (_, writes) in zip(dictionary.groups, dictionary.places, strict=True):
        W_FD = group.W_dec.new_zeros(group.num_latents, dictionary.widths.d_out)
        W_FD[:, writes] = group.W_dec.detach()
        rows.append(W_FD)
    return torch.cat(rows)


def raw_rows(dictionary: Dictionary, decoder_FD: Tensor, columns: slice = slice(None)) -> Tensor:
    """The `columns` of `decoder_rows` in the units of raw activations; under layer_norm in those of a token's scale."""
    rows = decoder_FD[:, columns]
    if dictionary.config.normalisation in ("none", "layer_norm"):
        return rows
    is_autoencoder = dictionary.config.is_autoencoder
    scale = per_column(dictionary.input_scale if is_autoencoder else dictionary.output_scale, dictionary.widths.writes)
    return rows / (scale if scale.dim() == 0 else scale[columns])
