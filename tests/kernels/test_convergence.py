"""Training with each implementation gives the same loss curve.

Tolerance: all start from the same weights and see the same batches in the same order; after S steps the losses may
differ by what rounding in another order does to S steps of Adam. Measured here below 1e-5 of the loss; 1e-3 is allowed.
"""

import pytest
import torch

from shared.sae.learn.dead import DeadLatents
from shared.sae.optim import AdamConfig, make_optimiser
from tests.learning import LearningSAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, TOLERANCE = 12, 8, 1e-3
LR = 1e-2


def loss_curve(kernels, compute_dtype="float32", steps=STEPS, batch=BATCH, d=6, num_latents=24):
    """Reconstruction losses of a run with AuxK on latents that really die, Multi-TopK, clipping, projection."""
    rng = torch.Generator().manual_seed(0)
    atoms = torch.randn(3 * d, d, generator=rng)
    codes = torch.rand(steps * batch, 3 * d, generator=rng)
    x = (codes * (codes > 0.95)) @ atoms + 0.01 * torch.randn(steps * batch, d, generator=rng)
    x = x.to(DEVICE)
    fields = {"auxk_alpha": 1 / 32, "multi_topk_weight": 1 / 8, "dead_after_tokens": 2 * batch}
    sae = LearningSAE(
        d_model=d, d_latent=num_latents, k=4, kernels=kernels, compute_dtype=compute_dtype, generator=rng, **fields
    ).to(DEVICE)
    sae.initialise(None, x)
    optimiser = make_optimiser(sae, AdamConfig(lr=LR), pair_gradients=True)
    sae.objective.pair_gradients = optimiser.pairs
    dead = DeadLatents(num_latents, sae.learning.dead_after_tokens, device=DEVICE)
    losses, most_dead = [], 0
    for rows in x.split(batch):
        step = sae.losses(rows, dead.mask())
        optimiser.zero_grad()
        step.total.backward()
        optimiser.step()
        most_dead = max(most_dead, int(dead.mask().sum()))
        dead.update(step.fired, batch)
        losses.append(float(step.reconstruction))
    assert most_dead > 0, "AuxK never had anything to do"
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), "nothing was learned"
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def reference_curve():
    return loss_curve("reference")


# Triton's interpreter takes half a minute; each of its kernels is compared with the reference in the other files.
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, indirect=True)
def test_kernels_give_the_same_loss_curve(kernels, reference_curve):
    curve = loss_curve(kernels)
    difference = float(((curve - reference_curve) / reference_curve).abs().max())
    assert difference < TOLERANCE, difference


def test_auto_gives_the_same_loss_curve(reference_curve):
    assert float(((loss_curve("auto") - reference_curve) / reference_curve).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, indirect=True)
def test_bfloat16_products_give_nearly_the_same_loss_curve(kernels, reference_curve):
    curve = loss_curve(kernels, "bfloat16")
    assert float(((curve - reference_curve) / reference_curve).abs().max()) < 2e-2
