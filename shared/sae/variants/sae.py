"""The sparse autoencoder.

    x~ = normalise(x);  z = W_enc (x~ - b_dec) + b_enc;  f = activation(z)
    x^ = denormalise(sum_i f_i W_dec[i] + b_dec)

Shapes: N tokens, D d_model, F latents, K picks per token, R dead latents. W_enc and W_dec are both [F, D], one row per
latent; the rows of W_dec have unit norm unless the config frees it. Parameters are float32; inputs of any float type
are upcast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from shared.basics.errors import GranaryError
from shared.kernels import COMPUTE_DTYPES, KERNELS, PairGradient, PairGradients, decode, take_rows
from shared.sae import folder as checkpoint
from shared.sae.activations import ACTIVATIONS
from shared.sae.config import SAEConfig
from shared.sae.latent_shard import WHOLE, Part
from shared.sae.latents import SAELosses, SAEOutput, SparseLatents, Survey
from shared.sae.learn.batch_facts import needs_survey
from shared.sae.learn.batch_facts import survey as survey_batch
from shared.sae.learn.dense_step import dense_losses
from shared.sae.learn.init import ActivationStatistics, initialise, random_unit_rows
from shared.sae.learn.losses import auxk_loss, reconstruction_weight, weighted_square_error
from shared.sae.learn.sparse_step import sparse_losses
from shared.sae.roles import Role

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
        num_latents: int | None = None,
    ) -> None:
        """`num_latents`: those held here; None: all of the config's."""
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
        self.part: Part = WHOLE
        """Which latents are held here; another one belongs to a shard."""
        self.pair_gradients: PairGradients | None = None
        """Where the gradients of W_enc and W_dec go instead of ``.grad``; set by an optimiser that reads them there."""
        d = config.d_model
        num_latents = config.d_latent if num_latents is None else num_latents
        self.W_enc = nn.Parameter(torch.empty(num_latents, d))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.activation = ACTIVATIONS[config.activation](config, num_latents)
        self.register_buffer("input_mean", torch.zeros(d))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_variance", torch.ones(d))  # of the normalised input
        if not self.W_dec.is_meta:
            random_unit_rows(self.W_dec, generator)
            with torch.no_grad():
                self.W_enc.copy_(self.W_dec)

    def roles(self) -> dict[str, Role]:
        """What each parameter and buffer is, by its name in ``state_dict``."""
        roles = {
            "W_enc": Role(latent_axis=0, from_pairs=True, is_matrix=True),
            "b_enc": Role(latent_axis=0, rate="bias"),
            "W_dec": Role(
                latent_axis=0,
                unit_rows=self.config.unit_norm_decoder,
                rate="decoder",
                from_pairs=True,
                is_matrix=True,
            ),
            "b_dec": Role(latent_axis=None),
        }
        for name, tensor in self.activation.state_dict().items():
            roles[f"activation.{name}"] = Role(latent_axis=0 if tensor.ndim else None)
        fixed = ("input_mean", "input_scale", "input_variance")
        return roles | {name: Role(latent_axis=None, learnt=False) for name in fixed}

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
    def encode(self, x: torch.Tensor, *, return_all_features: bool = False) -> SparseLatents:
        """Active latents of raw activations x [..., D]; values and indices are [..., K]. No gradient.

        K is k under topk, else the number of latents of the fullest token. What a token gets does not depend on the
        others: under batchtopk the learnt threshold decides. `return_all_features`: also all positive pre-activations,
        [..., F], from which the activation selects (OpenSAE's ``all_features``).
        """
        normal, token_mean, token_scale = self.normalise(x)
        normal_ND = normal.reshape(-1, self.config.d_model)
        centred_ND = normal_ND - self.b_dec if self.config.pre_bias else normal_ND
        values, indices = self.activation.encode(self, centred_ND)
        shape = (*x.shape[:-1], values.shape[-1])
        features = None
        if return_all_features:
            features = torch.relu(F.linear(centred_ND, self.W_enc, self.b_enc)).view(*x.shape[:-1], -1)
        return SparseLatents(values.view(shape), indices.view(shape), token_mean, token_scale, features)

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

    def forward(
        self,
        x: torch.Tensor,
        dead: torch.Tensor | None = None,
        *,
        return_losses: bool = False,
        return_all_features: bool = False,
    ) -> SAEOutput:
        """Encode and decode x [..., D], without gradient; with `return_losses` also what ``losses`` gives, with it."""
        latents = self.encode(x, return_all_features=return_all_features)
        losses = self.losses(x.reshape(-1, x.shape[-1]), dead) if return_losses else None
        return SAEOutput(self.decode(latents), latents, losses)

    # ---- training ------------------------------------------------------------------------------------------------

    def losses(
        self,
        x: torch.Tensor,
        dead: torch.Tensor | None = None,
        *,
        k: int | None = None,
        penalty_scale: float = 1.0,
        survey: Survey | None = None,
    ) -> SAELosses:
        """Loss of a batch of raw activations x [N, D].

        TopK and BatchTopK have a backward pass that costs N x K instead of N x F. `dead`: bool [F], or the int64
        indices of the dead latents (a bool mask on CUDA costs a host synchronisation); None: no AuxK. `k` and
        `penalty_scale` are for schedules. `survey` is this micro-batch's entry of ``survey``; None: x is the batch.
        """
        if not ACTIVATIONS[self.config.activation].fixes_l0:
            return dense_losses(self, x, dead, penalty_scale, survey)
        k = self.config.k if k is None else k
        assert k is not None
        if survey is None and needs_survey(self, cut=False):
            (survey,) = self.survey([x], len(x), k=k)
        return sparse_losses(self, x, dead, k, survey)

    def survey(self, parts: Sequence[torch.Tensor], num_tokens: int, **options: Any) -> list[Survey]:
        """What ``losses`` of each micro-batch must know of the whole batch; see ``shared.sae.learn.batch_facts``."""
        return survey_batch(self, parts, num_tokens, **options)

    def encoder_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
        """What the encoder multiplies, what the decoder must reconstruct, and layer_norm's mean and scale."""
        normal, token_mean, token_scale = self.normalise(x)
        target = normal if self.config.shift_back else x.to(normal)
        return normal - self.b_dec if self.config.pre_bias else normal, target, token_mean, token_scale

    def shared_pre_bias(self) -> torch.Tensor | None:
        """b_dec as the encoder subtracts it, with its gradient; None without a pre-encoder bias."""
        return self.part.sum_backward(self.b_dec) if self.config.pre_bias else None

    def loss_weight(self) -> torch.Tensor:
        """Weight [D] of the squared errors in the reconstruction loss."""
        return reconstruction_weight(self.input_variance, self.config.loss)

    def fvu(self, error_ND: torch.Tensor) -> torch.Tensor:
        """Ratio of summed squared error to the data set's summed variance, whatever the loss is."""
        return weighted_square_error(error_ND.detach(), reconstruction_weight(self.input_variance, "fvu"))

    def sink(self, name: str) -> PairGradient | None:
        """Where the gradient of W_enc or W_dec goes instead of ``.grad``; None: nowhere else."""
        return None if self.pair_gradients is None else self.pair_gradients[name]

    def decoder_norm(self) -> torch.Tensor | None:
        """Norms [F] of the decoder's rows, which weigh the penalties; None where they are 1."""
        return None if self.config.unit_norm_decoder else self.W_dec.norm(dim=1)

    def auxk(
        self, residual_ND: torch.Tensor, centred_ND: torch.Tensor, dead: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The AuxK loss; None where it is off or nothing is dead."""
        if dead is None or self.config.auxk_alpha == 0:
            return None
        dead_R = dead.nonzero().squeeze(1) if dead.dtype == torch.bool else dead
        num_dead = self.part.count_dead(dead_R.numel())
        if num_dead == 0:
            return None
        return auxk_loss(
            residual_ND,
            centred_ND,
            take_rows(self.W_enc, dead_R, self.sink("W_enc")),
            self.b_enc.index_select(0, dead_R),
            take_rows(self.W_dec, dead_R, self.sink("W_dec")),
            self.config.num_aux,
            num_dead=num_dead,
            part=self.part,
            kernels=self.kernels,
            compute_dtype=self.compute_dtype,
        )

    # ---- initialisation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, statistics: ActivationStatistics | None, sample: torch.Tensor) -> None:
        """Set normalisation, b_dec, directions and scale from data; see ``shared.sae.initialise``.

        `statistics` are the whole data set's (None: the sample's own); `sample` [M, D] are raw activations, a few
        thousand tokens.
        """
        initialise(self, statistics, sample)

    # ---- checkpoint ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``sae.safetensors``; see ``shared.sae.folder.save``."""
        checkpoint.save(Path(folder), self.config, self.state_dict(), provenance or {})

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a local folder or a Hugging Face hub repository (owner/name, hf://owner/name/folder).

        It needs no GPU and no triton, and reads every format of ``shared.sae.formats``. Raises GranaryError when the
        folder is missing, torn, or of a format that is not known.
        """
        folder = checkpoint.locate(path_or_hub_id)
        if not checkpoint.is_own(folder):
            from shared.sae import formats  # which imports this module

            if formats.foreign(folder) is not None:
                adopted: Any = formats.load_any(folder)[0].to(device)
                return adopted
        config, tensors, _ = checkpoint.load(folder, device)
        with torch.device("meta"):
            sae = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise GranaryError(f"{path_or_hub_id}: tensors missing, unknown or of the wrong shape: {', '.join(wrong)}")
        sae.load_state_dict(tensors, assign=True)
        return sae
