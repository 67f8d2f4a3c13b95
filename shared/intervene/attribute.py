"""Which latents made a metric what it is: all of them, at all tokens, from one forward and one backward pass.

    found = attribute(model, sae, inputs, lambda out: out.logits[0, -1, 17], "layers.2.resid_post")
    found.top(10)

The stream at the dictionary's place is ``decode(f)`` and an error that is held, so that the metric is a function of the
latents f, and ``(f - baseline) * gradient`` is what each of them gives it to first order: attribution patching on
latents (Marks et al. 2024, arXiv 2403.19647, section 3.1), the baseline being 0 or the latents of another input. With
`points` the gradient is the mean over a straight path from the baseline (integrated gradients, Sundararajan et al.
2017, arXiv 1703.01365), by the midpoint rule; the scores' sum then comes near to what the metric changes along it.

Shapes: B rows, T tokens, K slots of latents, D_out columns of what the dictionary writes, F latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.intervene.record import widen
from shared.intervene.splice import SplicedModel
from shared.lm.calls import arguments_of
from shared.lm.modulepoint import Point
from shared.lm.recomputation import is_checkpointed
from shared.sae.latents import SparseLatents
from shared.sae.variants import Dictionary
from shared.sae.variants.one_group import OneGroup

Metric = Callable[[Any], Tensor]
AT_ONCE = 1 << 24
"""Numbers of decoder rows, or gradients of latents, in memory at once."""


class Scored(NamedTuple):
    """One latent at one token."""

    score: float
    row: int
    position: int
    latent: int
    value: float


@dataclass(frozen=True)
class Attribution:
    """What each active latent gives to a metric."""

    metric: float
    """Of the model as it is."""
    latents: SparseLatents
    """Those of the run, [B, T, K]; with a baseline those that fire there alone too, with the value 0. Index -1 where
    there is none, and on tokens that the dictionary does not act on."""
    baseline: Tensor
    """float32 [B, T, K]: their values there."""
    gradient: Tensor
    """float32 [B, T, K]: what the metric gains for each unit of a latent's value."""
    scores: Tensor
    """float32 [B, T, K]: ``(values - baseline) * gradient``."""
    inactive: SparseLatents | None
    """Where asked for, the latents without a slot whose `values`, gradients, [B, T, n], are largest in size."""

    def top(self, number: int = 10) -> list[Scored]:
        """The latents at their tokens whose scores are largest in size."""
        flat = self.scores.flatten()
        best = flat.abs().topk(min(number, flat.numel())).indices.tolist()
        _, T, K = self.scores.shape
        found = [(one // (T * K), one // K % T, one % K) for one in best]
        return [
            Scored(float(self.scores[at]), at[0], at[1], int(self.latents.indices[at]), float(self.latents.values[at]))
            for at in found
            if self.latents.indices[at] >= 0
        ]

    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The latents that have a slot anywhere, int64 [n], and the sums of their scores, the largest in size first."""
        has = self.latents.indices >= 0
        numbers, inverse = self.latents.indices[has].unique(return_inverse=True)
        sums = self.scores.new_zeros(len(numbers)).index_add_(0, inverse, self.scores[has])
        order = sums.abs().argsort(descending=True)
        return numbers[order], sums[order]


def attribute(
    model: nn.Module,
    dictionary: Dictionary,
    inputs: Any,
    metric: Metric,
    hook: Point | str | None = None,
    *,
    baseline: Any = None,
    points: int | None = None,
    inactive: int = 0,
    include_bos: bool = False,
) -> Attribution:
    """What each latent of `dictionary` gives to ``metric(model(inputs))``, one number.

    `inputs` and `baseline` are what the model is called with: a mapping of named arguments, or a tuple of arguments.
    The baseline's latents are taken at the same rows and positions; None: zeros. `hook` and `include_bos` are those of
    ``SplicedModel``. `points`: how many of the path from the baseline, each a forward and a backward pass; None: the
    run as it is. `inactive`: of how many latents without a slot to give the gradient, at each token.

    It takes one forward and one backward pass; for a baseline a forward more, and with `points` one, for the metric of
    the run as it is. Nothing gets a ``.grad``.

    Raises GranaryError for a dictionary whose latents do not add a row each (CLT, MoLT), a metric that is not one
    number or does not depend on the place, and a baseline of another shape.
    """
    if not isinstance(dictionary, OneGroup) or not dictionary.writes_rows:
        raise GranaryError(f"a {dictionary.config.kind} is not attributed to: one with a decoder row per latent is")
    if points is not None and points < 1:
        raise GranaryError(f"points={points}: give 1 or more, or None for the run as it is")
    if inactive < 0:
        raise GranaryError(f"inactive={inactive}: give how many, or 0 for none")
    splice = _Pathed(model, dictionary, hook, include_bos=include_bos)
    if splice.inner.training and is_checkpointed(splice.inner):
        raise GranaryError("gradient checkpointing runs layers again in the backward pass: model.eval() first")
    if baseline is not None:
        with torch.no_grad():
            splice.run(baseline)
        splice.base = splice.kept
    shares = [1.0] if points is None else [(one + 0.5) / points for one in range(points)]
    gradient: Tensor | None = None
    for splice.share in shares:
        found, number = splice.differentiate(inputs, metric)
        gradient = found / len(shares) if gradient is None else gradient + found / len(shares)
    assert gradient is not None
    kept, base = splice.kept, splice.base_values
    g_units = _in_decoder_units(dictionary, kept, gradient)
    g_BTK = _of_slots(dictionary, kept.indices, g_units)
    if points is not None:
        number = splice.clean_metric(inputs, metric)
    return Attribution(
        number, kept, base, g_BTK, (kept.values - base) * g_BTK,
        _inactive(dictionary, kept, g_units, splice.acts, inactive) if inactive else None,
    )  # fmt: skip


class _Pathed(SplicedModel):
    """A splice that goes on from a point between a baseline and the run, and keeps what the gradient is asked of."""

    share = 1.0
    """How far from the baseline."""
    base: SparseLatents | None = None
    kept: SparseLatents
    base_values: Tensor
    acts: Tensor
    leaf: Tensor

    def _edit(self, x: Tensor) -> Tensor:
        """Zeros whose gradient is that of the written sites, and what the path changes there."""
        latents, acts = self._encoded(x)
        indices = torch.where(acts[..., None], latents.indices, -1)
        values = latents.values.masked_fill(indices < 0, 0)
        latents = replace(latents, values=values, indices=indices)
        self.acts, self.kept, self.base_values = acts, latents, torch.zeros_like(values)
        if self.base is not None:
            self.kept, self.base_values = _together(latents, self.base, acts)
        added = torch.zeros(*x.shape[:-1], self.sae.widths.d_out, device=x.device)
        if self.share != 1:
            path = self.base_values + self.share * (self.kept.values - self.base_values)
            added = self.sae.decode(replace(self.kept, values=path)) - self.sae.decode(self.kept)
        self.leaf = added.requires_grad_(torch.is_grad_enabled())
        return self.leaf

    def run(self, inputs: Any) -> Any:
        """The model's output."""
        args, kwargs = arguments_of(inputs)
        return self(*args, **kwargs)

    def differentiate(self, inputs: Any, metric: Metric) -> tuple[Tensor, float]:
        """The metric's gradient at the written sites, and the metric."""
        with torch.enable_grad():
            number = _number(metric(self.run(inputs)))
            if not number.requires_grad:
                raise GranaryError("the metric does not depend on the dictionary's place, or was detached from it")
            (gradient,) = torch.autograd.grad(number, self.leaf, allow_unused=True)
        if gradient is None:
            raise GranaryError("the metric does not depend on what comes out of the dictionary's place")
        return gradient, float(number.detach())

    def clean_metric(self, inputs: Any, metric: Metric) -> float:
        """The metric of the run as it is."""
        args, kwargs = arguments_of(inputs)
        with torch.no_grad():
            return float(_number(metric(self.model(*args, **kwargs))))


def _number(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise GranaryError(f"a metric is one number, as a tensor, this one gave {shape}: sum over rows and tokens")
    return value.reshape(())


def _together(latents: SparseLatents, base: SparseLatents, acts: Tensor) -> tuple[SparseLatents, Tensor]:
    """The latents with those of a baseline that have no slot yet, and the baseline's values of all."""
    if base.indices.shape[:-1] != latents.indices.shape[:-1]:
        theirs, own = list(base.indices.shape[:-1]), list(latents.indices.shape[:-1])
        raise GranaryError(f"the baseline has {theirs} rows and tokens, the run {own}: they are compared one by one")
    same = (latents.indices[..., :, None] == base.indices[..., None, :]) & (latents.indices[..., :, None] >= 0)
    values = (same * base.values[..., None, :]).sum(-1)
    is_new = (base.indices >= 0) & ~same.any(-2) & acts[..., None]
    width = latents.values.shape[-1] + base.values.shape[-1]
    indices = torch.cat([latents.indices, torch.where(is_new, base.indices, -1)], -1)
    joined = replace(latents, values=widen(latents.values, width, 0), indices=indices)
    return joined, torch.cat([values, torch.where(is_new, base.values, 0)], -1)


def _in_decoder_units(dictionary: OneGroup, latents: SparseLatents, gradient: Tensor) -> Tensor:
    """The gradient in front of what brings decoded latents to the units of the activations."""
    with torch.enable_grad():
        decoded = torch.zeros_like(gradient).requires_grad_()
        (found,) = torch.autograd.grad(
            dictionary.denormalise(decoded, latents.token_mean, latents.token_scale), decoded, gradient
        )
    return found


def _of_slots(dictionary: OneGroup, indices: Tensor, gradient: Tensor) -> Tensor:
    """[B, T, K]: the gradient of each slot's latent; 0 where there is none."""
    W_FD, K = dictionary.W_dec.detach(), indices.shape[-1]
    index_NK, g_ND = indices.reshape(-1, K), gradient.reshape(-1, W_FD.shape[1])
    step = max(1, AT_ONCE // max(1, K * W_FD.shape[1]))
    found = [
        torch.einsum("nkd,nd->nk", W_FD[i_nK.clamp_min(0)], g_nD)
        for i_nK, g_nD in zip(index_NK.split(step), g_ND.split(step), strict=True)
    ]
    return torch.cat(found).masked_fill(index_NK < 0, 0).view(indices.shape)


def _inactive(
    dictionary: OneGroup, latents: SparseLatents, gradient: Tensor, acts: Tensor, number: int
) -> SparseLatents:
    """The latents without a slot with the largest gradients, chunk by chunk of the decoder."""
    W_FD = dictionary.W_dec.detach()
    index_NK, g_ND = latents.indices.flatten(0, -2), gradient.reshape(-1, W_FD.shape[1])
    best_Nn, best_index_Nn = g_ND.new_zeros(len(g_ND), 0), index_NK.new_zeros(len(g_ND), 0)
    step = max(1, AT_ONCE // max(1, len(g_ND)))
    for start in range(0, len(W_FD), step):
        chunk_NC = g_ND @ W_FD[start : start + step].T
        inside_NK = (index_NK >= start) & (index_NK < start + chunk_NC.shape[1])
        rows, slots = inside_NK.nonzero(as_tuple=True)
        chunk_NC[rows, index_NK[rows, slots] - start] = 0
        values = torch.cat([best_Nn, chunk_NC], 1)
        own = torch.arange(start, start + chunk_NC.shape[1], device=index_NK.device).expand(len(g_ND), -1)
        chosen = values.abs().topk(min(number, values.shape[1]), dim=1).indices
        best_Nn, best_index_Nn = values.gather(1, chosen), torch.cat([best_index_Nn, own], 1).gather(1, chosen)
    has = (best_Nn != 0) & acts.reshape(-1, 1)
    shape = (*latents.indices.shape[:-1], best_Nn.shape[1])
    return SparseLatents(best_Nn.masked_fill(~has, 0).view(shape), best_index_Nn.masked_fill(~has, -1).view(shape))
