"""Which latents fire: the registry of activation functions, as far as encoding needs them.

An activation is a module, so that it may own parameters (per-latent thresholds) and buffers; they are saved with the
dictionary under ``activation.*``. All of them map the encoder's pre-activations z = W_enc x~ + b_enc to latents:

    topk        the k largest positive z of each token                             Gao et al. 2024, 2406.04093
    batchtopk   in training the N k largest positive z, later z > threshold        Bussmann et al. 2024, 2412.06410
    relu        max(z, 0)
    jumprelu    z where z > theta, theta = exp(log_threshold) per latent           Rajamanoharan et al. 2024, 2407.14435
    gated       max(exp(r_mag) (z - b_enc) + b_mag, 0) where z > 0                 Rajamanoharan et al. 2024, 2404.16014
    signed_topk the k largest z of each token, be they negative                    SAE Made Easy, saev

How each is learnt is in ``shared.sae.learn``. Shapes: N rows, D width of what is read, F latents held, K picks per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.kernels import Compute, encode_batchtopk, encode_threshold, encode_topk
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.roles import Role

# Pre-activations of which SignedTopK holds all at once.
MOST_DENSE = 1 << 26


@dataclass(frozen=True, slots=True)
class Encoder:
    """A group's encoder as the choice of latents sees it: of ``relu(z) n``, with a weight n for each latent or none."""

    W_enc: Tensor
    b_enc: Tensor
    compute: Compute
    norm_F: Tensor | None

    @property
    def num_latents(self) -> int:
        """Latents held here."""
        return self.W_enc.shape[0]

    def topk(self, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """The k largest positive z of each token: values [N, k] in descending order and indices, -1 for padding."""
        return encode_topk(_tokens(x), self.W_enc, self.b_enc, k, compute=self.compute)

    def above(self, x: Given, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
        """All z above a threshold, a scalar or [F]: values [N, M] in descending order and indices, -1 for padding."""
        return encode_threshold(_tokens(x), self.W_enc, self.b_enc, threshold, compute=self.compute)

    def largest_of_batch(self, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """The N k largest positive z of all tokens, likewise."""
        return encode_batchtopk(_tokens(x), self.W_enc, self.b_enc, k, compute=self.compute)

    def unweighted(self, values_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Chosen ``z n`` back to z; padding stays 0."""
        if self.norm_F is None:
            return values_NK
        return torch.where(indices_NK < 0, 0, values_NK / self.norm_F[indices_NK.clamp_min(0)])


def _tokens(x: Given) -> Tensor:
    """Return rows of tokens as they are; no dictionary gives whole contexts to a linear encoder."""
    assert isinstance(x, Tensor)
    return x


class Activation(nn.Module):
    """What all of them have."""

    def __init__(self, config: DictionaryConfig, num_latents: int) -> None:
        """`num_latents` are those held here, fewer than the config's in a shard."""
        super().__init__()

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Inference: values [N, K] and int64 indices [N, K], -1 for padding; a row does not depend on the others."""
        raise NotImplementedError

    def roles(self) -> dict[str, Role]:
        """Return those of its parameters and buffers, by name: one entry per latent each, unless a class differs."""
        return {name: Role(latent_axis=0) for name in self.state_dict()}


class TopK(Activation):
    """The k largest positive pre-activations of each token (Makhzani and Frey 2013; Gao et al. 2024)."""

    def __init__(self, config: DictionaryConfig, num_latents: int) -> None:
        super().__init__(config, num_latents)
        assert config.k is not None
        self.k = config.k

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Values in descending order, exactly k slots."""
        return self.select(encoder, x, self.k)

    def select(self, encoder: Encoder, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """Values [N, K] in descending order and int64 indices [N, K], -1 where nothing fires. No gradient."""
        return encoder.topk(x, k)


class SignedTopK(TopK):
    """The k largest pre-activations of each token as they are: where fewer than k are positive, negative ones too."""

    def select(self, encoder: Encoder, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """Return what TopK does, without padding. Blocks of rows bound the memory of z [N, F]."""
        x_ND = _tokens(x)
        block = max(1, MOST_DENSE // len(encoder.W_enc))
        found = [(x_MD @ encoder.W_enc.T + encoder.b_enc).topk(k) for x_MD in torch.split(x_ND, block)]
        if not found:
            return x_ND.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=x_ND.device)
        return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


class BatchTopK(Activation):
    """k latents per token on average over the batch; at inference a threshold that training has learnt stands for k.

    ``threshold`` is the moving average, over steps, of the least value that the batch kept.
    """

    threshold: Tensor

    def __init__(self, config: DictionaryConfig, num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Every z above the learnt threshold, in descending order."""
        return encoder.above(x, self.threshold)

    def roles(self) -> dict[str, Role]:
        """One threshold for all latents."""
        return {"threshold": Role(latent_axis=None)}


class ReLU(Activation):
    """Every positive pre-activation."""

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Encode in descending order."""
        return encoder.above(x, 0.0)


class JumpReLU(Activation):
    """Pre-activations above a threshold of each latent's own."""

    def __init__(self, config: DictionaryConfig, num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.log_threshold = nn.Parameter(torch.zeros(num_latents))

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Encode in descending order."""
        return encoder.above(x, self.log_threshold.exp())


class Gated(Activation):
    """One encoder decides which latents fire, a rescaled copy of it how strongly.

    The gate's pre-activation is z itself, so b_enc is the paper's b_gate and W_enc its W_gate.
    """

    def __init__(self, config: DictionaryConfig, num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.r_mag = nn.Parameter(torch.zeros(num_latents))
        self.b_mag = nn.Parameter(torch.zeros(num_latents))

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """Encode in descending order of z; a latent of open gate whose magnitude is not positive is padding."""
        z_NK, indices_NK = encoder.above(x, 0.0)
        latents_NK = indices_NK.clamp_min(0)
        pull_NK = z_NK - encoder.b_enc[latents_NK]
        values_NK = torch.relu(torch.exp(self.r_mag)[latents_NK] * pull_NK + self.b_mag[latents_NK])
        values_NK = values_NK.masked_fill(indices_NK < 0, 0.0)
        return values_NK, indices_NK.masked_fill(values_NK == 0, -1)


ACTIVATIONS: dict[str, type[Activation]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "signed_topk": SignedTopK,
}
