"""Starting values: normalisation, directions, bias and scale."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from shared.errors import GranaryError
from shared.kernels import decode, encode_batchtopk, smallest_kept
from shared.sae.activations import BatchTopK
from shared.sae.losses import weighted_square_error

if TYPE_CHECKING:
    from shared.sae.model import SAE

# Tokens of the sample that activations without a fixed L0 look at for their scale.
SEARCH_TOKENS = 1024
# Norms of decoder and encoder rows that norm_search tries first (Language-Model-SAEs).
NORMS = [round(0.1 * step, 1) for step in range(1, 51)]
# TopK and BatchTopK begin longer than fits best: fewer latents die, at the same FVU (docs/log.md, 2026-11-24).
OVERSHOOT = 1.25
# Scales of JumpReLU's encoder, from where nothing reaches the thresholds to where all does.
SCALES = [0.01 * 1.25**step for step in range(28)]


class ActivationStatistics(Protocol):
    """What initialisation reads of an activation store's statistics; arrays or tensors."""

    @property
    def mean(self) -> Any:
        """[D]."""

    @property
    def var(self) -> Any:
        """[D]."""

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a token."""


@torch.no_grad()
def random_unit_rows(W_FD: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Fill `W_FD` in place with rows uniform on the unit sphere."""
    W_FD.normal_(generator=generator)
    W_FD.div_(W_FD.norm(dim=1, keepdim=True))


def geometric_median(points_MD: torch.Tensor, *, max_steps: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point [D] with the least summed distance to `points_MD` (Weiszfeld 1937), in float32 or better.

    Stops when a step moves it by less than `tolerance` times the mean distance.
    """
    points_MD = points_MD.to(torch.promote_types(points_MD.dtype, torch.float32))
    median_D = points_MD.mean(0)
    for _ in range(max_steps):
        distance_M = (points_MD - median_D).norm(dim=1)
        # A point on the median would get infinite weight and hold it there for ever.
        weight_M = 1 / distance_M.clamp_min(1e-6 * float(distance_M.mean()) + torch.finfo(points_MD.dtype).tiny)
        moved_D = weight_M @ points_MD / weight_M.sum()
        step = float((moved_D - median_D).norm())
        median_D = moved_D
        if step <= tolerance * float(distance_M.mean()):
            break
    return median_D


def encoder_scale(target_MD: torch.Tensor, decoded_MD: torch.Tensor, weight_D: torch.Tensor) -> float:
    """argmin_s of ``sum w (target - s * decoded)^2``.

    With b_enc = 0 the choice of latents does not depend on the encoder's scale and the reconstruction is linear in it,
    so the best scale has this closed form; other projects search it on a grid. JumpReLU's thresholds break that.
    """
    scale = float((target_MD * decoded_MD * weight_D).sum() / (decoded_MD.square() * weight_D).sum())
    return scale if scale > 0 else 1.0


def grid_search(loss: Callable[[float], float], coarse: Sequence[float], steps: int) -> float:
    """The point with the least `loss` among `coarse`, then among `steps` points around it up to its neighbours."""
    losses = [loss(point) for point in coarse]
    best = losses.index(min(losses))
    low, high = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
    fine = torch.linspace(low, high, steps + 2).tolist()[1:-1]
    candidates = {coarse[best]: losses[best], **{point: loss(point) for point in fine}}
    return min(candidates, key=lambda point: candidates[point])


def into_subspace(W_FD: torch.Tensor, points_MD: torch.Tensor, rank: int) -> torch.Tensor:
    """Unit rows in the span of the `rank` principal directions of `points_MD`, with as many of W's coordinates."""
    centred_MD = (points_MD - points_MD.mean(0)).double()
    _, vectors_DD = torch.linalg.eigh(centred_MD.T @ centred_MD)  # ascending
    rows_FD = W_FD[:, :rank] @ vectors_DD[:, -rank:].T.to(W_FD.dtype)
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)


@torch.no_grad()
def initialise(sae: "SAE", statistics: ActivationStatistics | None, sample: torch.Tensor) -> None:
    """See ``SAE.initialise``. Raises GranaryError when there is nothing to learn from."""
    config = sae.config
    sample_MD = sample.reshape(-1, config.d_model).to(sae.W_enc)
    if sample_MD.shape[0] < 2:
        raise GranaryError("initialising an SAE needs at least 2 tokens")
    if statistics is None:
        mean_D, variance_D = sample_MD.mean(0), sample_MD.var(0, correction=0)
        mean_norm = float(sample_MD.norm(dim=1).mean())
    else:
        mean_D = torch.as_tensor(statistics.mean).to(sae.input_mean)
        variance_D = torch.as_tensor(statistics.var).to(sae.input_mean)
        mean_norm = float(statistics.mean_norm)
    if float(variance_D.sum()) == 0:
        raise GranaryError("all activations are equal: there is nothing to reconstruct")
    set_normalisation(sae, mean_D, variance_D, mean_norm)

    _, target_MD, _, _ = sae.encoder_input(sample_MD)
    if config.normalisation == "layer_norm" and config.shift_back:
        sae.input_variance.copy_(target_MD.var(0, correction=0))
    sae.b_enc.zero_()
    if config.bias_init == "zero":
        sae.b_dec.zero_()
    elif config.bias_init == "mean":
        sae.b_dec.copy_(target_MD.mean(0))
    else:
        sae.b_dec.copy_(geometric_median(target_MD))
    if config.init_subspace is not None:
        sae.W_dec.copy_(into_subspace(sae.W_dec, sae.normalise(sample_MD)[0], config.init_subspace))
    set_scale(sae, sample_MD)


def set_normalisation(sae: "SAE", mean_D: torch.Tensor, variance_D: torch.Tensor, mean_norm: float) -> None:
    """The buffers that ``normalise`` reads, and the variance of what the decoder must reconstruct."""
    config, root_d = sae.config, math.sqrt(sae.config.d_model)
    sae.input_mean.zero_()
    sae.input_scale.fill_(1.0)
    if config.normalisation == "scale":
        sae.input_scale.fill_(root_d / mean_norm)
    elif config.normalisation == "centre_scale":
        sae.input_mean.copy_(mean_D)
        sae.input_scale.fill_(root_d / float(variance_D.sum().sqrt()))
    sae.input_variance.copy_(variance_D * sae.input_scale.square())


def set_scale(sae: "SAE", sample_MD: torch.Tensor) -> None:
    """The encoder as the decoder's transpose, times what the config's ``encoder_init`` says; BatchTopK's threshold."""
    config = sae.config
    if config.activation != "topk":
        sample_MD = sample_MD[:SEARCH_TOKENS]  # half of all latents may fire
    directions_FD = sae.W_dec.clone()
    sae.W_enc.copy_(directions_FD)
    centred_MD, target_MD, _, _ = sae.encoder_input(sample_MD)
    wanted_MD, weight_D = target_MD - sae.b_dec, sae.loss_weight()

    def decoded_with(encoder: float, decoder: float) -> torch.Tensor:
        sae.W_enc.copy_(directions_FD * encoder)
        sae.W_dec.copy_(directions_FD * decoder)
        _set_threshold(sae, sample_MD)
        values, indices = sae.activation.encode(sae, centred_MD)
        return decode(values, indices, sae.W_dec, kernels=sae.kernels)

    def loss_with(encoder: float, decoder: float) -> float:
        return float(weighted_square_error(decoded_with(encoder, decoder) - wanted_MD, weight_D))

    if config.encoder_init == "transpose":
        _set_threshold(sae, sample_MD)
    elif config.encoder_init == "norm_search":
        norm = grid_search(lambda norm: loss_with(norm, norm), NORMS, steps=20)
        decoded_with(norm, norm)
    elif config.activation == "jumprelu":
        scale = grid_search(lambda scale: loss_with(scale, 1.0), SCALES, steps=10)
        decoded_with(scale, 1.0)
    else:
        scale = encoder_scale(wanted_MD, decoded_with(1.0, 1.0), weight_D)
        decoded_with(scale * OVERSHOOT if sae.activation.fixes_l0 else scale, 1.0)


def _set_threshold(sae: "SAE", sample_MD: torch.Tensor) -> None:
    """BatchTopK's is what keeps k latents per token of the sample."""
    if isinstance(sae.activation, BatchTopK):
        assert sae.config.k is not None
        centred_MD = sae.encoder_input(sample_MD)[0]
        kept = encode_batchtopk(centred_MD, sae.W_enc, sae.b_enc, sae.config.k, compute=sae.compute)
        sae.activation.threshold.copy_(smallest_kept(*kept))
