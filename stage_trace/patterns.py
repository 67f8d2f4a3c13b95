"""The attention of a Lorsa on one prompt, held: its patterns, and which of its latents fire by them.

A Lorsa has patterns of its own, which its queries and keys make of what it reads; the language model's play no part.
Shapes: T positions, D width of the stream, H heads, F latents, L = F / H of a head, n of some positions or latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels.attention import QueryKey, patterns
from shared.kernels.encode_topk.torch_ import select_topk
from shared.kernels.ragged import pad_dense
from shared.sae.activations import Encoder
from shared.sae.contexts import Given
from shared.sae.variants import Lorsa
from stage_trace.group_weights import Folded

AT_ONCE = 1 << 22
"""Pre-activations of a block of positions."""


@dataclass(frozen=True, slots=True)
class Patterns:
    """A pattern per head."""

    pattern_HTT: Tensor
    """Rows are the positions of latents, columns those that they read."""
    per_head: int
    """Latents that a head serves."""

    @classmethod
    def of_prompt(cls, lorsa: Lorsa, folded: Folded, x_TD: Tensor) -> "Patterns":
        """Those of one document, what it reads given in raw units; computed in the wider type of both."""
        wide = torch.promote_types(x_TD.dtype, lorsa.b_dec.dtype)
        normal_TD = (x_TD.to(wide) - folded.input_mean.to(wide)) * folded.input_scale.to(wide)
        held = lorsa.query_key
        heads = QueryKey(*(None if one is None else one.to(wide) for one in held.tensors()))  # type: ignore[arg-type]
        document_1T = torch.zeros(1, len(x_TD), dtype=torch.int64, device=x_TD.device)
        pattern_HTT = patterns(normal_TD[None], document_1T, heads, lorsa.config.form, lorsa.compute)[0]
        return cls(pattern_HTT, lorsa.config.latents_per_head)

    def of(self, latent_n: Tensor, position_n: Tensor, like: Tensor) -> Tensor:
        """What some latents at some positions attend to, [n, T] in the type of `like`."""
        return self.pattern_HTT[latent_n // self.per_head, position_n].to(like)


def fire_by(held: Patterns, lorsa: Lorsa, normal_TD: Tensor) -> Tensor:
    """Indices [T, K] of the latents that fire, -1 for padding: the Lorsa's own choice, by patterns that are held.

    Some positions at a time: no [T, F] tensor where that is large.
    """
    W_HLD = lorsa.W_enc.view(-1, held.per_head, lorsa.W_enc.shape[1])
    encoder = _Chooser(lorsa.W_enc, lorsa.b_enc, lorsa.compute, None)
    found = []
    for some in torch.split(torch.arange(len(normal_TD)), max(1, AT_ONCE // len(lorsa.W_enc))):
        mixed_HnD = held.pattern_HTT[:, some].to(normal_TD) @ normal_TD
        z_nF = (mixed_HnD @ W_HLD.transpose(1, 2)).transpose(0, 1).flatten(1) + lorsa.b_enc
        found.append(lorsa.activation.encode(encoder, z_nF)[1])
    width = max(indices_nK.shape[1] for indices_nK in found)
    return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1]), value=-1) for one in found])


@dataclass(frozen=True, slots=True)
class _Chooser(Encoder):
    """An encoder that is given pre-activations z [n, F]."""

    def topk(self, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """The k largest positive z of each row."""
        assert isinstance(x, Tensor)
        values_nK, indices_nK = select_topk(x, min(k, x.shape[1]))
        return values_nK.relu(), indices_nK.masked_fill(values_nK <= 0, -1)

    def above(self, x: Given, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
        """All z above a threshold, a scalar or [F]."""
        assert isinstance(x, Tensor)
        return pad_dense(x, ~(x <= threshold))
