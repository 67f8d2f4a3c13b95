"""A dictionary that learns, behind the one function that the stages need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from step_providers import Shape, make_batch
from torch import Tensor

from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Contexts, Given
from shared.sae.learn.dead import DeadLatents, in_turn, most_dead
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.many_groups import ManyGroups
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import SiteWidths
from shared.sae.variants import VARIANTS, Dictionary
from shared.sae.variants.molt import MoLT

KINDS = ("topk", "batchtopk", "transcoder")
SITES = {"crosscoder": 2, "clt": 4}
"""Sites of a kind on each side, of `d_model` each; of a CLT its layers."""
LADDER = {64: 1, 32: 2, 16: 4, 8: 8, 4: 16}
"""Ranks of one unit of a MoLT, of which there are as many as make a quarter of the shape's latents in rows."""
CONTEXT, QK_HEADS, QK_WIDTH = 256, 16, 32
"""Of a Lorsa: positions of a context, of which a batch is cut, heads of queries and keys and their width."""
FITTED_ROWS = 64
QUIET = 64
"""Where nothing else is said, one latent in so many is too quiet to be picked, and counts as dead: AuxK has them to
revive, so many at a time as in training."""


@dataclass
class Trainee:
    """Ready to learn."""

    dictionary: Any
    step: Callable[[Tensor], Tensor]
    """One optimiser step on a batch [N, d]; returns the reconstruction loss, on the device."""
    state_bytes: int
    """Of weights and moments."""


def make_trainee(
    shape: Shape,
    device: str,
    *,
    kind: str = "topk",
    kernels: str = "triton",
    compute_dtype: str = "bfloat16",
    moments: str = "float32",
    pair_gradients: bool = True,
    lr: float = 1e-4,
    quiet: int = QUIET,
) -> Trainee:
    """The whole recipe: AuxK, clipping, projection, exact Adam. Starts are the same for the same shape and kind.

    A batch has the columns of all sites that are read, side by side: see ``SITES``. One latent in `quiet` is dead.
    """
    made, config = described(shape, kind)
    with torch.device(device):
        dictionary = made(config, kernels=kernels, compute_dtype=compute_dtype)
        objective = Objective(dictionary)
    num_latents = config.d_latent
    dead_R = torch.arange(0, num_latents, quiet, device=device)
    if device != "meta":  # where there are no values
        sample = start(dictionary, shape, dead_R)
        if isinstance(objective.rule, ManyGroups):  # as training does before the first step: a search from 0 is long
            objective.rule.fit_to_sample(dictionary.centred(dictionary.normalise(sample[:FITTED_ROWS])[0]))
    optimiser = make_optimiser(dictionary, AdamConfig(lr=lr, moments=moments), pair_gradients=pair_gradients)
    if pair_gradients:
        objective.pair_gradients = optimiser.pairs
    together_R = in_turn(dead_R, most_dead(dictionary.widths), turn=0)
    tracker = DeadLatents(num_latents, 10_000_000, device=device)

    def step(x: Tensor) -> Tensor:
        losses = objective.losses(given(dictionary, x), written(dictionary, x), StepInputs(dead=together_R))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        objective.rule.after_step(None)
        tracker.update(losses.fired, len(x))
        return losses.reconstruction

    tensors = [*dictionary.parameters(), *(m for kind_ in optimiser.moments.values() for m in kind_.values())]
    return Trainee(dictionary, step, sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def described(shape: Shape, kind: str) -> tuple[type[Dictionary], DictionaryConfig]:
    """Class and config: `shape` is that of each site and, of a CLT, of each layer."""
    sites = SITES.get(kind, 1)
    layers = sites if kind == "clt" else 1
    name = kind if kind in VARIANTS else "sae"
    widths = SiteWidths((shape.d_model,) * sites, (shape.d_model,) * sites)
    fields: dict[str, Any] = {
        "d_latent": shape.d_latent * layers,
        "k": shape.k * layers,
        "activation": "batchtopk" if kind in ("batchtopk", "clt") else "topk",
        "pre_bias": name == "sae",
    }
    if kind == "lorsa":
        turns = tuple(10_000 ** (-2 * pair / QK_WIDTH) for pair in range(QK_WIDTH // 2))
        fields |= {"qk_heads": QK_HEADS, "qk_width": QK_WIDTH, "scale": QK_WIDTH**-0.5, "frequencies": turns}
    if kind == "molt":
        fields["ranks"] = ranks_of(shape)
        fields["d_latent"] = sum(fields["ranks"].values())
    return VARIANTS[name], VARIANTS[name].config_class.of(widths, fields)


def ranks_of(shape: Shape) -> dict[int, int]:
    """Of a MoLT."""
    units = max(1, shape.d_latent // 4 // sum(rank * count for rank, count in LADDER.items()))
    return {rank: units * count for rank, count in LADDER.items()}


def written(dictionary: Dictionary, x: Tensor) -> Tensor:
    """What must be produced from what is read: itself, or some other place."""
    return x if dictionary.config.is_autoencoder else x.roll(1, dims=1)


def given(dictionary: Dictionary, x: Tensor) -> Given:
    """The batch, or as whole contexts where the dictionary reads those."""
    return x if dictionary.config.unit == "token" else Contexts.whole(x.view(-1, CONTEXT, x.shape[1]))


@torch.no_grad()
def start(dictionary: Dictionary, shape: Shape, dead_R: Tensor) -> Tensor:
    """Random directions, and a bias and variances that fit the batches; returns the sample that they are of."""
    device = dictionary.b_dec.device
    first = 0
    for group in dictionary.groups:
        if not isinstance(group, MoLT):  # which is random already
            rows = torch.randn(group.W_dec.shape, device=device, generator=torch.Generator(device).manual_seed(0))
            group.W_dec.copy_(rows.div_(rows.norm(dim=1, keepdim=True)))
            group.W_enc.copy_(group.W_dec[:, : group.W_enc.shape[1]])
        own_R = dead_R[(dead_R >= first) & (dead_R < first + group.num_latents)] - first
        group.W_enc[own_R] *= 0.1
        first += group.num_latents
    columns = dictionary.widths.d_in
    sample = make_batch(Shape(columns, shape.d_latent, shape.k, min(512, shape.batch)), str(device))
    target = written(dictionary, sample)
    dictionary.b_dec.copy_(target.mean(0))
    dictionary.input_variance.copy_(sample.var(0, correction=0))
    if target is not sample:
        dictionary.output_variance.copy_(target.var(0, correction=0))
    return sample
