"""Planted dictionary: known atoms, sparse codes; training must find the atoms."""

import pytest
import torch

from shared.sae import SAE, DeadLatents, SAEAdam, SAEConfig


def planted(num_atoms=96, d=48, active=3, seed=0):
    """Unit atoms [A, d] and a function that draws tokens: each a positive combination of `active` atoms plus a mean."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(num_atoms, d, generator=generator), dim=1)
    mean = torch.randn(d, generator=generator)

    def draw(n):
        chosen = torch.rand(n, num_atoms, generator=generator).topk(active).indices
        codes = torch.zeros(n, num_atoms).scatter(1, chosen, 0.5 + torch.rand(n, active, generator=generator))
        return codes @ atoms + mean

    return atoms, draw


@pytest.mark.parametrize("kernels", ["torch"])
def test_recovers_the_atoms(kernels):
    atoms, draw = planted()
    sae = SAE(SAEConfig(d_model=48, d_latent=128, k=3, dead_after_tokens=50_000), kernels=kernels)
    sae.initialise(None, draw(4096))
    optimiser, dead = SAEAdam(sae, 1e-2), DeadLatents(128, 50_000)
    steps, batch = 600, 512
    for step in range(steps):
        losses = sae.losses(draw(batch), dead.mask())
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step(1e-2 * min(1.0, (step + 1) / 50, (steps - step) / 200))
        dead.update(losses.fired, batch)

    x = draw(4096)
    error = (sae(x).x_hat - x).square().sum()
    fvu = float(error / (x - x.mean(0)).square().sum())
    found = float(((atoms @ sae.W_dec.T).amax(1) > 0.95).float().mean())
    assert fvu < 0.05
    assert found >= 0.9
