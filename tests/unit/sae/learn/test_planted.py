"""Planted dictionary: known atoms, sparse codes; training must find the atoms."""

import pytest
import torch

from shared.sae.learn.dead import DeadLatents
from shared.sae.optim import AdamConfig, make_optimiser
from tests.learning import LearningSAE


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


# What each needs beside its activation to settle on the 3 atoms of a token.
RECIPES = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3, "threshold_decay": 0.95},
    "matryoshka": {"activation": "batchtopk", "k": 3, "prefixes": (24, 64, 96)},
    "jumprelu": {"penalty": "l0", "penalty_weight": 1e-2},
    "gated": {"penalty": "l1", "penalty_weight": 5e-2},
    "relu": {"penalty": "l1", "penalty_weight": 4e-2, "unit_norm_decoder": False},
}


def train(sae, draw, steps, batch=512, lr=1e-2):
    optimiser = make_optimiser(sae, AdamConfig(lr=lr))
    dead = DeadLatents(sae.config.d_latent, sae.learning.dead_after_tokens)
    for step in range(steps):
        x, facts = draw(batch), [None]
        if sae.config.activation == "batchtopk":
            facts = sae.facts([x], batch)
        losses = sae.losses(x, dead.mask(), facts=facts[0], penalty_scale=min(1.0, (step + 1) / 100))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step(lr * min(1.0, (step + 1) / 50, (steps - step) / 100))
        if facts[0] is not None:
            sae.objective.rule.after_step(facts[0])
        dead.update(losses.fired, batch)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("relu", "matryoshka", "gated", "jumprelu") else [])
        for name in RECIPES
    ],
)
def test_recovers_the_atoms(name):
    atoms, draw = planted(num_atoms=72, d=32)
    fields = {"activation": name, "d_model": 32, "d_latent": 96, "dead_after_tokens": 50_000, **RECIPES[name]}
    sae = LearningSAE(generator=torch.Generator().manual_seed(0), **fields)
    sae.initialise(None, draw(2048))
    train(sae, draw, steps=350)

    x = draw(4096)
    output = sae(x)
    fvu = float((output.x_hat - x).square().sum() / (x - x.mean(0)).square().sum())
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    found = float(((atoms @ rows.T).amax(1) > 0.9).float().mean())
    l0 = float((output.latents.indices >= 0).sum()) / len(x)
    assert found >= 0.9
    assert fvu < 0.15  # l1 shrinks relu
    assert l0 < 8
    if sae.config.activation == "batchtopk":  # by the learnt threshold alone
        assert l0 == pytest.approx(3, rel=0.05)
        alone = torch.cat([sae(row[None]).x_hat for row in x[:20]])
        torch.testing.assert_close(alone, output.x_hat[:20])
