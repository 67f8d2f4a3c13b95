"""The sparse autoencoder.

    x~ = normalise(x);  z = W_enc (x~ - b_dec) + b_enc;  f = activation(z)
    x^ = denormalise(sum_i f_i W_dec[i] + b_dec)

Shapes: N tokens, D d_model, F latents, K picks per token, R dead latents. W_enc and W_dec are both [F, D], one row per
latent; the rows of W_dec have unit norm. Parameters are float32; inputs of any float type are upcast.
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from shared.errors import GranaryError
from shared.kernels import (
    COMPUTE_DTYPES,
    KERNELS,
    PairGradient,
    PairGradients,
    PairOrder,
    attach_encoder,
    decode,
    sparse_decode,
    take_rows,
)
from shared.sae import checkpoint
from shared.sae.activations import ACTIVATIONS
from shared.sae.config import SAEConfig
from shared.sae.init import ActivationStatistics, encoder_scale, geometric_median, random_unit_rows
from shared.sae.latents import SAELosses, SAEOutput, SparseLatents
from shared.sae.losses import auxk_loss, reconstruction_weight, weighted_square_error

LAYER_NORM_EPS = 1e-5


class SAE(nn.Module):
    """A sparse autoencoder as its config describes it; random until ``initialise`` or ``from_pretrained``.

    How it computes is not part of the config: `kernels` is auto, triton, torch or reference, and `compute_dtype`
    (float32 or bfloat16) is the type of the encoder's matrix product; see ``shared.kernels.encode_topk``. Both may be
    assigned later. Raises GranaryError for other values.
    """

    input_mean: torch.Tensor
    input_scale: torch.Tensor
    input_variance: torch.Tensor

    def __init__(
        self,
        config: SAEConfig,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("kernels", kernels, KERNELS),
            ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
        ):
            if value not in choices:
                raise GranaryError(f"{name}={value!r}: choose from {', '.join(choices)}")
        self.config = config
        self.kernels = kernels
        self.compute_dtype = compute_dtype
        self.pair_gradients: PairGradients | None = None
        """Where the gradients of W_enc and W_dec go instead of ``.grad``; set by an optimiser that reads them there."""
        d, num_latents = config.d_model, config.d_latent
        self.W_enc = nn.Parameter(torch.empty(num_latents, d))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.activation = ACTIVATIONS[config.activation]()
        self.register_buffer("input_mean", torch.zeros(d))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_variance", torch.ones(d))  # of the normalised input
        if not self.W_dec.is_meta:
            random_unit_rows(self.W_dec, generator)
            with torch.no_grad():
                self.W_enc.copy_(self.W_dec)

    # ---- normalisation -------------------------------------------------------------------------------------------

    def normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Raw activations [..., D] to the encoder's units, with the per-token mean and scale under layer_norm."""
        if x.shape[-1] != self.config.d_model:
            raise GranaryError(f"the SAE reads activations of width {self.config.d_model}, got {x.shape[-1]}")
        x = x.to(self.W_enc.dtype)
        if self.config.normalisation == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).square().mean(-1, keepdim=True).sqrt() + LAYER_NORM_EPS
            return (x - mean) / scale, mean, scale
        if self.config.normalisation == "none":
            return x, None, None
        return (x - self.input_mean) * self.input_scale, None, None

    def denormalise(
        self, x_hat: torch.Tensor, token_mean: torch.Tensor | None = None, token_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The inverse of ``normalise``; nothing where the config says that latents reconstruct raw activations."""
        if not self.config.shift_back:
            return x_hat
        if self.config.normalisation == "layer_norm":
            if token_mean is None or token_scale is None:
                raise GranaryError("under layer_norm these latents need their tokens' mean and scale, as encode gives")
            return x_hat * token_scale + token_mean
        if self.config.normalisation == "none":
            return x_hat
        return x_hat / self.input_scale + self.input_mean

    # ---- inference -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> SparseLatents:
        """Active latents of raw activations x [..., D]; values and indices are [..., k]. No gradient."""
        normal, token_mean, token_scale = self.normalise(x)
        normal_ND = normal.reshape(-1, self.config.d_model)
        centred_ND = normal_ND - self.b_dec if self.config.pre_bias else normal_ND
        values, indices = self.activation.select(self, centred_ND, self.config.k)
        shape = (*x.shape[:-1], values.shape[-1])
        return SparseLatents(values.view(shape), indices.view(shape), token_mean, token_scale)

    @torch.no_grad()
    def decode(self, latents: SparseLatents) -> torch.Tensor:
        """Reconstruction [..., D] in the scale of the raw activations, in the parameters' dtype. No gradient."""
        width = latents.values.shape[-1]
        x_hat_ND = decode(
            latents.values.reshape(-1, width).to(self.W_dec.dtype),
            latents.indices.reshape(-1, width),
            self.W_dec,
            kernels=self.kernels,
        )
        x_hat = (x_hat_ND + self.b_dec).view(*latents.values.shape[:-1], self.config.d_model)
        return self.denormalise(x_hat, latents.token_mean, latents.token_scale)

    def forward(self, x: torch.Tensor) -> SAEOutput:
        """Encode and decode x [..., D]. No gradient: training goes through ``losses``."""
        latents = self.encode(x)
        return SAEOutput(self.decode(latents), latents)

    # ---- training ------------------------------------------------------------------------------------------------

    def losses(self, x: torch.Tensor, dead: torch.Tensor | None = None, *, k: int | None = None) -> SAELosses:
        """Loss of a batch of raw activations x [N, D], with a backward pass that costs N x K instead of N x F.

        `dead`: bool [F], or the int64 indices of the dead latents (a bool mask on CUDA costs a host synchronisation);
        None: no AuxK. `k` overrides the config's, for schedules.
        """
        config = self.config
        if not config.shift_back:
            raise GranaryError("an SAE with shift_back=false can't be trained: its target is not its input")
        k = config.k if k is None else k
        with torch.no_grad():
            x_ND, token_mean, token_scale = self.normalise(x)
            centred_ND = x_ND - self.b_dec if config.pre_bias else x_ND
            width = min(config.multi_topk_factor * k, config.d_latent) if config.multi_topk_weight > 0 else k
            values_NK, indices_NK = self.activation.select(self, centred_ND, width)
        num_latents = self.W_enc.shape[0]  # those held here: fewer than config.d_latent in a shard
        order = PairOrder(indices_NK, num_latents)
        values_NK = attach_encoder(
            centred_ND,
            self._pre_bias(),
            self.W_enc,
            self.b_enc,
            values_NK,
            indices_NK,
            order,
            kernels=self.kernels,
            compute_dtype=self.compute_dtype,
            sink=self._sink("W_enc"),
        )
        weight_D = reconstruction_weight(self.input_variance, config.loss)
        metrics: dict[str, torch.Tensor] = {}

        main_values, main_indices = values_NK[:, :k], indices_NK[:, :k]
        # Without extra picks the encoder and the decoder share one sort of the pairs.
        main_order = order if width == k else PairOrder(main_indices, num_latents)
        error_ND = self._decode_picks(main_values, main_indices, main_order) + self.b_dec - x_ND
        reconstruction = weighted_square_error(error_ND, weight_D)
        total = reconstruction
        if width > k:
            extra_indices = indices_NK[:, k:]
            extra_ND = self._decode_picks(values_NK[:, k:], extra_indices, PairOrder(extra_indices, num_latents))
            multi = weighted_square_error(error_ND + extra_ND, weight_D)
            total = total + config.multi_topk_weight * multi
            metrics["multi_topk"] = multi.detach()

        auxk = self._auxk(-error_ND.detach(), centred_ND, dead)
        if auxk is not None:
            total = total + config.auxk_alpha * auxk
            metrics["auxk"] = auxk.detach()

        with torch.no_grad():
            metrics["reconstruction"] = reconstruction.detach()
            fvu_weight = reconstruction_weight(self.input_variance, "fvu")
            metrics["fvu"] = (
                reconstruction.detach() if config.loss == "fvu" else weighted_square_error(error_ND, fvu_weight)
            )
            metrics["l0"] = (main_indices >= 0).sum(dtype=torch.float32) / main_indices.shape[0]
        return SAELosses(
            total=total,
            reconstruction=metrics["reconstruction"],
            latents=SparseLatents(main_values.detach(), main_indices, token_mean, token_scale),
            auxk=metrics.get("auxk"),
            multi_topk=metrics.get("multi_topk"),
            metrics=metrics,
        )

    def _pre_bias(self) -> torch.Tensor | None:
        """b_dec as the encoder subtracts it; None without a pre-encoder bias."""
        return self.b_dec if self.config.pre_bias else None

    def _decode_picks(self, values_NK: torch.Tensor, indices_NK: torch.Tensor, order: PairOrder) -> torch.Tensor:
        return sparse_decode(
            values_NK,
            indices_NK,
            self.W_dec,
            order,
            kernels=self.kernels,
            compute_dtype=self.compute_dtype,
            sink=self._sink("W_dec"),
        )

    def _sink(self, name: str) -> PairGradient | None:
        return None if self.pair_gradients is None else self.pair_gradients[name]

    def _auxk(
        self, residual_ND: torch.Tensor, centred_ND: torch.Tensor, dead: torch.Tensor | None
    ) -> torch.Tensor | None:
        if dead is None or self.config.auxk_alpha == 0:
            return None
        dead_R = dead.nonzero().squeeze(1) if dead.dtype == torch.bool else dead
        if dead_R.numel() == 0:
            return None
        return auxk_loss(
            residual_ND,
            centred_ND,
            take_rows(self.W_enc, dead_R, self._sink("W_enc")),
            self.b_enc.index_select(0, dead_R),
            take_rows(self.W_dec, dead_R, self._sink("W_dec")),
            self.config.num_aux,
            kernels=self.kernels,
            compute_dtype=self.compute_dtype,
        )

    # ---- initialisation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, statistics: ActivationStatistics | None, sample: torch.Tensor) -> None:
        """Set normalisation, b_dec and the encoder's scale from data.

        `statistics` are the whole data set's (None: the sample's own); `sample` [M, D] are raw activations, a few
        thousand tokens. Decoder rows keep their random directions; the encoder is their transpose times the one
        factor that minimises the loss on the sample.
        """
        sample_MD = sample.reshape(-1, self.config.d_model).to(self.W_enc)
        if sample_MD.shape[0] < 2:
            raise GranaryError("initialising an SAE needs at least 2 tokens")
        if statistics is None:
            mean_D, variance_D = sample_MD.mean(0), sample_MD.var(0, correction=0)
            mean_norm = float(sample_MD.norm(dim=1).mean())
        else:
            mean_D = torch.as_tensor(statistics.mean).to(self.input_mean)
            variance_D = torch.as_tensor(statistics.var).to(self.input_mean)
            mean_norm = float(statistics.mean_norm)
        if float(variance_D.sum()) == 0:
            raise GranaryError("all activations are equal: there is nothing to reconstruct")
        self._set_normalisation(mean_D, variance_D, mean_norm)

        normal_MD, _, _ = self.normalise(sample_MD)
        if self.config.normalisation == "layer_norm":
            self.input_variance.copy_(normal_MD.var(0, correction=0))
        self.b_enc.zero_()
        if self.config.bias_init == "zero":
            self.b_dec.zero_()
        elif self.config.bias_init == "mean":
            self.b_dec.copy_(normal_MD.mean(0))
        else:
            self.b_dec.copy_(geometric_median(normal_MD))

        self.W_enc.copy_(self.W_dec)
        centred_MD = normal_MD - self.b_dec if self.config.pre_bias else normal_MD
        values, indices = self.activation.select(self, centred_MD, self.config.k)
        decoded_MD = decode(values, indices, self.W_dec, kernels=self.kernels)
        weight_D = reconstruction_weight(self.input_variance, self.config.loss)
        self.W_enc.mul_(encoder_scale(normal_MD - self.b_dec, decoded_MD, weight_D))

    def _set_normalisation(self, mean_D: torch.Tensor, variance_D: torch.Tensor, mean_norm: float) -> None:
        root_d = math.sqrt(self.config.d_model)
        self.input_mean.zero_()
        self.input_scale.fill_(1.0)
        if self.config.normalisation == "scale":
            self.input_scale.fill_(root_d / mean_norm)
        elif self.config.normalisation == "centre_scale":
            self.input_mean.copy_(mean_D)
            self.input_scale.fill_(root_d / float(variance_D.sum().sqrt()))
        self.input_variance.copy_(variance_D * self.input_scale.square())

    # ---- checkpoint ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``sae.safetensors``; see ``shared.sae.checkpoint.save``."""
        checkpoint.save(Path(folder), self.config, self.state_dict(), provenance or {})

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a local folder or a Hugging Face hub repository; needs no GPU and no triton.

        Raises GranaryError when the folder is missing, torn or not an SAE of this project.
        """
        config, tensors, _ = checkpoint.load(checkpoint.locate(path_or_hub_id), device)
        with torch.device("meta"):
            sae = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise GranaryError(f"{path_or_hub_id}: tensors missing, unknown or of the wrong shape: {', '.join(wrong)}")
        sae.load_state_dict(tensors, assign=True)
        return sae
