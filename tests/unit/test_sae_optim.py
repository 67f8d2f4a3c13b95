"""SAEAdam against torch.optim.Adam, its projections, its clip and its state."""

import pytest
import torch

from shared.errors import GranaryError
from shared.kernels.row_update import cpu as row_update_cpu
from shared.sae import SAE, SAEAdam, SAEConfig


def make_sae(seed=0, d=7, num_latents=30):
    config = SAEConfig(d_model=d, d_latent=num_latents, k=3, normalisation="none")
    return SAE(config, generator=torch.Generator().manual_seed(seed))


def batch(step, d=7):
    return torch.randn(64, d, generator=torch.Generator().manual_seed(100 + step)) + 1


def train(sae, optimiser, steps, start=0):
    for step in range(start, start + steps):
        optimiser.zero_grad()
        sae.losses(batch(step)).total.backward()
        optimiser.step()


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_equals_torch_adam_with_projection_and_clip(clip_norm, monkeypatch):
    monkeypatch.setattr(row_update_cpu, "TILE_ELEMENTS", 40)  # several tiles, the last one ragged
    ours, theirs = make_sae(), make_sae()
    optimiser = SAEAdam(ours, 1e-2, betas=(0.8, 0.95), eps=1e-7, clip_norm=clip_norm)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    for step in range(5):
        optimiser.zero_grad()
        ours.losses(batch(step)).total.backward()
        norm = optimiser.step()

        reference.zero_grad()
        theirs.losses(batch(step)).total.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        W = theirs.W_dec
        with torch.no_grad():
            W.grad -= (W.grad * W).sum(1, keepdim=True) * W
        reference.step()
        with torch.no_grad():
            W /= W.norm(dim=1, keepdim=True)
        torch.testing.assert_close(norm, expected_norm)
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_decoder_rows_have_unit_norm_after_every_step():
    sae = make_sae()
    optimiser = SAEAdam(sae, 0.3)
    for step in range(4):
        train(sae, optimiser, 1, start=step)
        assert float((sae.W_dec.detach().double().norm(dim=1) - 1).abs().max()) < 1e-6


def test_no_gradient_along_the_rows_enters_the_moments():
    sae = make_sae()
    before = sae.W_dec.detach().clone()
    optimiser = SAEAdam(sae, 1e-3)
    train(sae, optimiser, 1)
    along = (optimiser.moments["first"]["W_dec"] * before).sum(1)
    assert float(along.abs().max()) < 1e-6 * float(optimiser.moments["first"]["W_dec"].norm(dim=1).max())
    assert float(optimiser.moments["first"]["W_dec"].norm()) > 0


def test_clip_uses_the_joint_norm():
    sae = make_sae()
    optimiser = SAEAdam(sae, 1e-3, clip_norm=0.01, betas=(0.0, 0.0))
    sae.losses(batch(0)).total.backward()
    grads = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    true_norm = float(torch.cat([grad.flatten() for grad in grads.values()]).norm())
    assert true_norm > 0.01
    assert float(optimiser.step()) == pytest.approx(true_norm, rel=1e-5)
    for name in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(optimiser.moments["first"][name], grads[name] * (0.01 / true_norm))
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_a_given_norm_replaces_the_local_one():
    sae = make_sae()
    optimiser = SAEAdam(sae, 1e-3, clip_norm=1.0, betas=(0.0, 0.0))
    sae.losses(batch(0)).total.backward()
    grad = sae.W_enc.grad.clone()
    returned = optimiser.step(grad_norm=torch.tensor(4.0))
    assert float(returned) == 4.0
    torch.testing.assert_close(optimiser.moments["first"]["W_enc"], grad / 4)


def test_stopping_and_resuming_gives_the_same_bits():
    straight = make_sae()
    train(straight, SAEAdam(straight, 1e-2), 6)

    halted = make_sae()
    optimiser = SAEAdam(halted, 1e-2)
    train(halted, optimiser, 3)
    weights = {name: tensor.clone() for name, tensor in halted.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimiser.state_dict().items()}

    resumed = make_sae(seed=5)
    resumed.load_state_dict(weights)
    optimiser = SAEAdam(resumed, 1e-2)
    optimiser.load_state_dict(state)
    train(resumed, optimiser, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_wrong_uses_are_one_line():
    sae = make_sae()
    with pytest.raises(GranaryError, match="lr=0"):
        SAEAdam(sae, 0)
    with pytest.raises(GranaryError, match="betas"):
        SAEAdam(sae, 1e-3, betas=(0.9, 1.0))
    with pytest.raises(GranaryError, match="clip_norm"):
        SAEAdam(sae, 1e-3, clip_norm=0.0)
    optimiser = SAEAdam(sae, 1e-3)
    with pytest.raises(GranaryError, match="before backward"):
        optimiser.step()
    with pytest.raises(GranaryError, match="does not match"):
        optimiser.load_state_dict({"num_steps": torch.zeros(())})
