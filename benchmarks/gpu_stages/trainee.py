"""A dictionary that learns, behind the one function that the stages need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from step_providers import Shape, make_batch
from torch import Tensor

from shared.sae.config import SAEConfig
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.variants import SAE, Transcoder
from shared.sae.variants.transcoder import TranscoderConfig

KINDS = ("topk", "batchtopk", "transcoder")
QUIET = 64
"""One latent in so many is too quiet to be picked, and counts as dead: AuxK has them to revive."""


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
) -> Trainee:
    """The whole recipe: AuxK, clipping, projection, exact Adam. Starts are the same for the same shape and kind."""
    common: dict[str, Any] = {"d_latent": shape.d_latent, "k": shape.k}
    common["activation"] = "batchtopk" if kind == "batchtopk" else "topk"
    with torch.device(device):
        dictionary: Any
        if kind == "transcoder":
            config = TranscoderConfig(d_in=shape.d_model, d_out=shape.d_model, pre_bias=False, **common)
            dictionary = Transcoder(config, kernels=kernels, compute_dtype=compute_dtype)
        else:
            dictionary = SAE(SAEConfig(d_model=shape.d_model, **common), kernels=kernels, compute_dtype=compute_dtype)
        objective = Objective(dictionary, LearningConfig())
    dead_R = torch.arange(0, shape.d_latent, QUIET, device=device)
    if device != "meta":  # where there are no values
        start(dictionary, shape, dead_R)
    optimiser = make_optimiser(dictionary, AdamConfig(lr=lr, moments=moments), pair_gradients=pair_gradients)
    if pair_gradients:
        objective.pair_gradients = optimiser.pairs
    tracker = DeadLatents(shape.d_latent, 10_000_000, device=device)

    def step(x: Tensor) -> Tensor:
        losses = objective.losses(x, x.roll(1, dims=1) if kind == "transcoder" else x, StepInputs(dead=dead_R))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        tracker.update(losses.fired, len(x))
        return losses.reconstruction

    tensors = [*dictionary.parameters(), *(m for kind_ in optimiser.moments.values() for m in kind_.values())]
    return Trainee(dictionary, step, sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@torch.no_grad()
def start(dictionary: Any, shape: Shape, dead_R: Tensor) -> None:
    """Random directions, and a bias and variances that fit the batches."""
    device = dictionary.W_dec.device
    rows = torch.randn(dictionary.W_dec.shape, device=device, generator=torch.Generator(device).manual_seed(0))
    dictionary.W_dec.copy_(rows.div_(rows.norm(dim=1, keepdim=True)))
    dictionary.W_enc.copy_(dictionary.W_dec)
    dictionary.W_enc[dead_R] *= 0.1
    sample = make_batch(Shape(shape.d_model, shape.d_latent, shape.k, min(512, shape.batch)), str(device))
    target = sample if isinstance(dictionary, SAE) else sample.roll(1, dims=1)
    dictionary.b_dec.copy_(target.mean(0))
    dictionary.input_variance.copy_(sample.var(0, correction=0))
    if target is not sample:
        dictionary.output_variance.copy_(target.var(0, correction=0))
