"""Starting values: normalisation, directions, bias and scale.

Shape letters: M tokens of a sample, D a width (D_in of what is read, D_out of what is written), F latents, K picks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self
from unittest.mock import patch

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.kernels import PairOrder, row_grad
from shared.sae.contexts import Contexts, Given, in_parts
from shared.sae.learn.config import SkipLearningConfig
from shared.sae.learn.losses import weighted_square_error
from shared.sae.learn.objective import Objective
from shared.sae.learn.skip import start_skip
from shared.sae.learn.start_heads import start_heads
from shared.sae.learn.start_maps import start_maps
from shared.sae.variants.base import Dictionary, per_column
from shared.sae.variants.lorsa import Lorsa
from shared.sae.variants.molt import MoLT
from shared.sae.variants.one_group import OneGroup

if TYPE_CHECKING:
    from shared.lm.attention import ModelHeads

# Tokens of the sample that activations without a fixed L0 look at for their scale.
SEARCH_TOKENS = 1024
# Pairs of token and latent that may fire at a time while the start is looked for: each takes about 128 bytes.
SEARCH_PAIRS = 1 << 24
# Norms of decoder and encoder rows that norm_search tries first (Language-Model-SAEs).
NORMS = [round(0.1 * step, 1) for step in range(1, 51)]
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


def row_norm(x_MD: Tensor) -> Tensor:
    """Norm of each row, [M]."""
    return x_MD.norm(dim=1)


def geometric_median(
    points_MD: Tensor, *, max_steps: int = 100, tolerance: float = 1e-6, norms: Callable[[Tensor], Tensor] = row_norm
) -> Tensor:
    """The point [D] with the least summed distance to `points_MD` (Weiszfeld 1937), in float32 or better.

    Stops when a step moves it by less than `tolerance` times the mean distance. `norms`: of rows of which maybe only
    some columns are here.
    """
    points_MD = points_MD.to(torch.promote_types(points_MD.dtype, torch.float32))
    median_D = points_MD.mean(0)
    for _ in range(max_steps):
        distance_M = norms(points_MD - median_D)
        # A point on the median would get infinite weight and hold it there for ever.
        weight_M = 1 / distance_M.clamp_min(1e-6 * float(distance_M.mean()) + torch.finfo(points_MD.dtype).tiny)
        moved_D = weight_M @ points_MD / weight_M.sum()
        step = float(norms((moved_D - median_D)[None]))
        median_D = moved_D
        if step <= tolerance * float(distance_M.mean()):
            break
    return median_D


def keep(sums: Tensor) -> Tensor:
    """Sums over all columns, where all are here."""
    return sums


def encoder_scale(
    target_MD: Tensor, decoded_MD: Tensor, weight_D: Tensor, sum_up: Callable[[Tensor], Tensor] = keep
) -> float:
    """argmin_s of ``sum w (target - s * decoded)^2``; `sum_up` adds what is found at columns that are elsewhere.

    With b_enc = 0 the choice of latents does not depend on the encoder's scale and the reconstruction is linear in it,
    so the best scale has this closed form; other projects search it on a grid. JumpReLU's thresholds break that.
    """
    sums = ((target_MD * decoded_MD * weight_D).sum(), (decoded_MD.square() * weight_D).sum())
    along, square = sum_up(torch.stack(sums))
    scale = float(along / square)
    return scale if scale > 0 else 1.0


def grid_search(loss: Callable[[float], float], coarse: Sequence[float], steps: int) -> float:
    """The point with the least `loss` among `coarse`, then among `steps` points around it up to its neighbours."""
    losses = [loss(point) for point in coarse]
    best = losses.index(min(losses))
    low, high = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
    fine = torch.linspace(low, high, steps + 2).tolist()[1:-1]
    candidates = {coarse[best]: losses[best], **{point: loss(point) for point in fine}}
    return min(candidates, key=lambda point: candidates[point])


@contextmanager
def trying_once(d_latent: int) -> Iterator[None]:
    """Within the context a start does once what it does again and again, for those who ask for its memory alone."""
    few = max(1, min(SEARCH_TOKENS, SEARCH_PAIRS // d_latent))
    with patch.multiple(__name__, grid_search=lambda loss, coarse, steps: loss(coarse[0]), SEARCH_TOKENS=few):
        yield


def into_subspace(W_FD: Tensor, points_MD: Tensor, rank: int) -> Tensor:
    """Unit rows in the span of the `rank` principal directions of `points_MD`, with as many of W's coordinates."""
    centred_MD = (points_MD - points_MD.mean(0)).double()
    _, vectors_DD = torch.linalg.eigh(centred_MD.T @ centred_MD)  # ascending
    rows_FD = W_FD[:, :rank] @ vectors_DD[:, -rank:].T.to(W_FD.dtype)
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)


@torch.no_grad()
def initialise(
    objective: Objective,
    statistics: Sequence[ActivationStatistics] | None,
    sample: Given,
    target_statistics: Sequence[ActivationStatistics] | None = None,
    target_sample: Tensor | None = None,
    *,
    heads: "ModelHeads | None" = None,
) -> None:
    """Set normalisation, b_dec, directions and scale from data.

    `statistics` are the whole data set's (None: the sample's own) of every site that is read; `sample` [M, D_in] are
    raw activations, a few thousand tokens, or whole contexts of which M count. The last two are those of what is
    written, at the same tokens; not looked at for an autoencoder. `heads` are the language model's, of the layer that a
    Lorsa begins from. Raises GranaryError when there is nothing to learn from.
    """
    dictionary, learning, rule = objective.dictionary, objective.learning, objective.rule
    widths = dictionary.widths
    if isinstance(sample, Contexts):
        x: Given = sample.to(dictionary.b_dec.device)
        x_MD = sample.counted(sample.rows_CTD).to(dictionary.b_dec)
    else:
        x = x_MD = sample.reshape(-1, widths.d_in).to(dictionary.b_dec)
    if x_MD.shape[0] < 2:
        raise GranaryError("initialising an SAE needs at least 2 tokens")
    moments = Moments.of(statistics, x_MD, widths.reads)
    centre(moments, dictionary, dictionary.input_mean, dictionary.input_scale, dictionary.input_variance)
    y_MD = x_MD
    if not dictionary.config.is_autoencoder:
        if target_sample is None:
            raise GranaryError("a dictionary that writes elsewhere than it reads needs a sample of what it writes")
        y_MD = target_sample.reshape(-1, widths.d_out).to(dictionary.b_dec)
        moments = Moments.of(target_statistics, y_MD, widths.writes)
        centre(moments, dictionary, dictionary.output_mean, dictionary.output_scale, dictionary.output_variance)
    rule.start()
    if heads is not None:
        assert isinstance(dictionary, Lorsa)
        start_heads(dictionary, heads, objective.shard.first // dictionary.config.latents_per_head)

    centred, target_MD, _, _ = objective.terms.prepare(x, y_MD)
    if dictionary.config.normalisation == "layer_norm" and dictionary.config.shift_back:
        dictionary.input_variance.copy_(target_MD.var(0, correction=0))
    for group in dictionary.groups:
        group.b_enc.zero_()
    if learning.bias_init == "zero":
        dictionary.b_dec.zero_()
    elif learning.bias_init == "mean":
        dictionary.b_dec.copy_(target_MD.mean(0))
    else:
        dictionary.b_dec.copy_(geometric_median(target_MD, norms=objective.terms.token_norms))
    if dictionary.config.is_autoencoder:
        assert isinstance(dictionary, OneGroup)
        if learning.init_subspace is not None:
            points_MD = dictionary.normalise(x_MD)[0]
            dictionary.W_dec.copy_(into_subspace(dictionary.W_dec, points_MD, learning.init_subspace))
        dictionary.W_enc.copy_(dictionary.W_dec)
    else:
        if isinstance(learning, SkipLearningConfig):
            assert isinstance(dictionary, OneGroup)
            assert isinstance(centred, Tensor)
            start_skip(dictionary, learning, centred, target_MD)
        if isinstance(dictionary, MoLT):
            start_maps(objective, dictionary, x_MD, y_MD)
        else:
            start_decoder_from_data(objective, x, y_MD)
    set_scale(objective, x, y_MD)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of activations of several sites side by side, and the mean norm of a token of each site."""

    mean_D: Tensor
    variance_D: Tensor
    mean_norms: tuple[float, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, statistics: Sequence[ActivationStatistics] | None, sample_MD: Tensor, widths: tuple[int, ...]) -> Self:
        """Take the data set's statistics, or the sample's own. Raises GranaryError where a site does not vary."""
        if statistics is None:
            mean_D, variance_D = sample_MD.mean(0), sample_MD.var(0, correction=0)
            norms = tuple(float(site_MD.norm(dim=1).mean()) for site_MD in sample_MD.split(widths, dim=1))
        else:
            mean_D = torch.cat([torch.as_tensor(site.mean).to(sample_MD) for site in statistics])
            variance_D = torch.cat([torch.as_tensor(site.var).to(sample_MD) for site in statistics])
            norms = tuple(float(site.mean_norm) for site in statistics)
        if any(float(site_D.sum()) == 0 for site_D in variance_D.split(widths)):
            raise GranaryError("all activations are equal: there is nothing to reconstruct")
        return cls(mean_D, variance_D, norms, widths)


def centre(moments: Moments, dictionary: Dictionary, mean_D: Tensor, scale: Tensor, variance_D: Tensor) -> None:
    """Fill the buffers of one side as the config's normalisation says: what is taken off, the factor of each site, and
    the variance of what comes out."""
    kind = dictionary.config.normalisation
    mean_D.copy_(moments.mean_D if kind == "centre_scale" else torch.zeros_like(mean_D))
    factors = [1.0] * len(moments.widths)
    if kind == "scale":
        factors = [math.sqrt(width) / norm for width, norm in zip(moments.widths, moments.mean_norms, strict=True)]
    elif kind == "centre_scale":
        spreads = [float(site_D.sum().sqrt()) for site_D in moments.variance_D.split(moments.widths)]
        factors = [math.sqrt(width) / spread for width, spread in zip(moments.widths, spreads, strict=True)]
    scale.copy_(torch.tensor(factors).view_as(scale))
    variance_D.copy_(moments.variance_D * per_column(scale, moments.widths).square())


def start_decoder_from_data(objective: Objective, x: Given, y_MD: Tensor) -> None:
    """Each decoder row as the mean of what is wanted where its latent fires, with its strength for a weight, made unit.

    The encoder's transpose lies in another space. Latents that no token of the sample fires keep their random rows.
    """
    dictionary = objective.dictionary
    x, y_MD = looked_at(objective, x, y_MD)
    centred, target_MD, _, _ = objective.terms.prepare(x, y_MD)
    objective.rule.fit_to_sample(centred)
    wanted_MD = objective.terms.wanted(target_MD, centred) - dictionary.b_dec
    sums: list[Tensor] = []
    for given, part in parts_of_sample(objective, centred):
        found = []
        for (W_dec, writes), picks in zip(dictionary.decoders, objective.terms.fire(given), strict=True):
            own_MD, order = wanted_MD[part, writes].contiguous(), PairOrder(picks[1], len(W_dec))
            found.append(row_grad(*picks, own_MD, len(W_dec), order, kernels=dictionary.kernels))
        sums = [before_FD.add_(rows_FD) for before_FD, rows_FD in zip(sums, found, strict=True)] if sums else found
    dictionary.start_decoders(sums, objective.terms.row_norms(sums))


def looked_at(objective: Objective, x: Given, y_MD: Tensor) -> tuple[Given, Tensor]:
    """The tokens of the sample that the start looks at: where half of all latents may fire, few."""
    if objective.rule.looks_at_all:
        return x, y_MD
    few, part = in_parts(x, SEARCH_TOKENS)[0]
    return few, y_MD[part]


def parts_of_sample(objective: Objective, centred: Given) -> list[tuple[Given, slice]]:
    """Its tokens in parts that are encoded at a time: all, where the number of picks is fixed."""
    if objective.rule.looks_at_all:
        return [(centred, slice(0, len(centred)))]
    return in_parts(centred, max(1, SEARCH_PAIRS // objective.dictionary.config.d_latent))


def set_scale(objective: Objective, x: Given, y_MD: Tensor) -> None:
    """The encoder's and decoder's rows times what ``encoder_init`` says, and thresholds that follow from them."""
    dictionary, learning, rule, terms = objective.dictionary, objective.learning, objective.rule, objective.terms
    x, y_MD = looked_at(objective, x, y_MD)
    searches_norms = learning.encoder_init == "norm_search"  # else the decoders stay as they are
    searches = searches_norms or rule.scale_search == "grid"

    def with_first(matrix_FD: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix, and its rows before any scale; the first try of two is 1, and leaves them as they are."""
        return matrix_FD.detach(), matrix_FD.detach().clone() if searches else matrix_FD.detach()

    encoders = [with_first(group.W_enc) for group in dictionary.groups]
    decoders = [with_first(W_dec) for W_dec, _ in dictionary.decoders] if searches_norms else []
    centred, target_MD, _, _ = terms.prepare(x, y_MD)
    wanted_MD = terms.wanted(target_MD, centred) - dictionary.b_dec
    weight_D = terms.loss_weight()

    def decoded_with(encoder: float, decoder: float) -> Tensor:
        for times, matrices in ((encoder, encoders), (decoder, decoders)):
            for matrix_FD, first_FD in matrices:
                torch.mul(first_FD, times, out=matrix_FD)
        rule.fit_to_sample(centred)
        return torch.cat([terms.decoded(terms.fire(one), one) for one, _ in parts_of_sample(objective, centred)])

    def loss_with(encoder: float, decoder: float) -> float:
        error = weighted_square_error(decoded_with(encoder, decoder) - wanted_MD, weight_D)
        return float(terms.sum_over_columns(error))

    if learning.encoder_init == "transpose":
        rule.fit_to_sample(centred)
    elif searches_norms:
        norm = grid_search(lambda norm: loss_with(norm, norm), NORMS, steps=20)
        decoded_with(norm, norm)
    elif rule.scale_search == "grid":
        scale = grid_search(lambda scale: loss_with(scale, 1.0), SCALES, steps=10)
        decoded_with(scale, 1.0)
    else:
        scale = encoder_scale(wanted_MD, decoded_with(1.0, 1.0), weight_D, terms.sum_over_columns)
        decoded_with(scale * rule.overshoot, 1.0)
