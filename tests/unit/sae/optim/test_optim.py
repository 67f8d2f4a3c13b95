"""The optimisers against torch's and plain formulas: projections, clip, state; weight average and spike guard."""

import dataclasses
import json
import sys

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.kernels.row_update import torch_ as row_update_cpu
from shared.sae import SAE, SAEConfig
from shared.sae.optim import Adam, Adam8bitConfig, AdamConfig, MuonConfig, RowShare, SignumConfig, adam, make_optimiser
from shared.sae.optim.adam import round_stochastically
from stage_train.step.spike_guard import PATIENCE, WINDOW, SpikeGuard
from stage_train.step.weight_average import WeightAverage
from tests.learning import LearningSAE


def make_sae(seed=0, d=7, num_latents=30):
    generator = torch.Generator().manual_seed(seed)
    return LearningSAE(d_model=d, d_latent=num_latents, k=3, normalisation="none", generator=generator)


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
    optimiser = make_optimiser(ours, AdamConfig(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-7, clip_norm=clip_norm))
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


@pytest.mark.parametrize("config_type", [AdamConfig, SignumConfig, MuonConfig])
@pytest.mark.parametrize("pair_gradients", [False, True])
def test_a_factor_multiplies_the_rate_of_its_parameter_alone(config_type, pair_gradients):
    factors = {"W_dec": 3.0, "b_enc": 0.5}
    options = {"decoder_factor": 3.0, "bias_factor": 0.5}

    def stepped(lr, **options):
        sae = make_sae()
        train(sae, make_optimiser(sae, config_type(lr=lr, **options), pair_gradients=pair_gradients), 1)
        return dict(sae.named_parameters())

    plain, ours = stepped(1e-2), stepped(1e-2, **options)
    for name, factor in {"W_enc": 1.0, "b_dec": 1.0, **factors}.items():
        assert torch.equal(ours[name], stepped(1e-2 * factor)[name]), name
        assert torch.equal(ours[name], plain[name]) == (factor == 1.0), name


@pytest.mark.parametrize("config_type", [AdamConfig, SignumConfig, MuonConfig])
def test_roles_decide_and_names_do_not(config_type):
    """The same tensors under names that swap encoder and decoder, with the roles they have: the same bits."""
    other = {"W_enc": "W_dec", "b_enc": "tall", "W_dec": "groups.0.W_enc", "b_dec": "b_enc"}
    config = config_type(lr=1e-2, decoder_factor=3.0, bias_factor=0.5)
    ours, renamed = make_sae(), make_sae()
    optimiser = make_optimiser(ours, config)
    blind = type(optimiser)(
        {other[name]: parameter for name, parameter in renamed.named_parameters()},
        {other[name]: role for name, role in renamed.roles().items() if name in other},
        config,
    )
    train(ours, optimiser, 3)
    train(renamed, blind, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), renamed.parameters(), strict=True))
    assert not torch.equal(ours.W_dec, make_sae().W_dec)


def test_only_what_is_a_sum_over_pairs_is_kept_as_pairs():
    sae = make_sae()
    roles = {**sae.roles(), "W_enc": dataclasses.replace(sae.roles()["W_enc"], from_pairs=False)}
    optimiser = Adam(dict(sae.named_parameters()), roles, AdamConfig(lr=1e-2), pair_gradients=True)
    assert list(optimiser.pairs) == ["W_dec"]


def test_muon_scales_its_rate_by_the_rows_of_all_processes():
    grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    moved = []
    for parts in (1, 4):
        sae = make_sae(d=8, num_latents=24)
        before = sae.W_enc.detach().clone()
        optimiser = make_optimiser(sae, MuonConfig(lr=1e-2), rows=RowShare(parts))
        sae.W_enc.grad = grad.clone()
        optimiser.step()
        moved.append(sae.W_enc.detach() - before)
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-4, atol=1e-6)


def test_decoder_rows_have_unit_norm_after_every_step():
    sae = make_sae()
    optimiser = make_optimiser(sae, AdamConfig(lr=0.3))
    for step in range(4):
        train(sae, optimiser, 1, start=step)
        assert float((sae.W_dec.detach().double().norm(dim=1) - 1).abs().max()) < 1e-6


def test_no_gradient_along_the_rows_enters_the_moments():
    sae = make_sae()
    before = sae.W_dec.detach().clone()
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-3))
    train(sae, optimiser, 1)
    along = (optimiser.moments["first"]["W_dec"] * before).sum(1)
    assert float(along.abs().max()) < 1e-6 * float(optimiser.moments["first"]["W_dec"].norm(dim=1).max())
    assert float(optimiser.moments["first"]["W_dec"].norm()) > 0


@pytest.mark.parametrize("pair_gradients", [False, True])
def test_lazy_equals_torch_sparse_adam(pair_gradients, monkeypatch):
    """Row by row of the matrices; nearly no latent fires in every step."""
    monkeypatch.setattr(adam, "GATHERED_ELEMENTS", 100)  # several pieces, the last one ragged
    ours, theirs = (
        LearningSAE(d_model=7, d_latent=300, k=2, unit_norm_decoder=False, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    config = AdamConfig(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-30, clip_norm=None, lazy=True)
    optimiser = make_optimiser(ours, config, pair_gradients=pair_gradients)
    ours.objective.pair_gradients = optimiser.pairs if pair_gradients else None
    reference = torch.optim.SparseAdam(list(theirs.parameters()), lr=1e-2, betas=(0.8, 0.95), eps=1e-30)
    fired_F = torch.zeros(300, dtype=torch.int64)
    for step in range(6):
        train(ours, optimiser, 1, start=step)
        losses = theirs.losses(batch(step))
        losses.total.backward()
        fired_F += losses.fired
        for parameter in theirs.parameters():
            parameter.grad = parameter.grad.to_sparse(1)
        reference.step()
        reference.zero_grad()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert int((fired_F == 0).sum()) > 10
    assert int(((fired_F > 0) & (fired_F < 6)).sum()) > 10


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_lazy_leaves_what_has_no_gradient_as_it_is(moments, monkeypatch):
    monkeypatch.setattr(adam, "GATHERED_ELEMENTS", 100)
    sae = make_sae(num_latents=300)
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-2, lazy=True, moments=moments))
    train(sae, optimiser, 3)
    state = {**dict(sae.named_parameters()), **optimiser.state_dict()}
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    losses = sae.losses(batch(9))
    losses.total.backward()
    optimiser.step()
    for name, tensor in state.items():
        if len(tensor.shape) and len(tensor) == 300:
            same_F = (tensor == before[name]).reshape(300, -1).all(1)
            assert torch.equal(same_F, ~losses.fired), name
    assert 0 < int(losses.fired.sum()) < 300


def test_clip_uses_the_joint_norm():
    sae = make_sae()
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-3, clip_norm=0.01, beta1=0.0, beta2=0.0))
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
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-3, clip_norm=1.0, beta1=0.0, beta2=0.0))
    sae.losses(batch(0)).total.backward()
    grad = sae.W_enc.grad.clone()
    returned = optimiser.step(grad_norm=torch.tensor(4.0))
    assert float(returned) == 4.0
    torch.testing.assert_close(optimiser.moments["first"]["W_enc"], grad / 4)


def test_stopping_and_resuming_gives_the_same_bits():
    straight = make_sae()
    train(straight, make_optimiser(straight, AdamConfig(lr=1e-2)), 6)

    halted = make_sae()
    optimiser = make_optimiser(halted, AdamConfig(lr=1e-2))
    train(halted, optimiser, 3)
    weights = {name: tensor.clone() for name, tensor in halted.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimiser.state_dict().items()}

    resumed = make_sae(seed=5)
    resumed.load_state_dict(weights)
    optimiser = make_optimiser(resumed, AdamConfig(lr=1e-2))
    optimiser.load_state_dict(state)
    train(resumed, optimiser, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_wrong_uses_are_one_line():
    sae = make_sae()
    with pytest.raises(GranaryError, match="lr=0"):
        AdamConfig(lr=0)
    with pytest.raises(GranaryError, match=r"beta2=1\.0"):
        AdamConfig(lr=1e-3, beta2=1.0)
    with pytest.raises(GranaryError, match="clip_norm"):
        AdamConfig(lr=1e-3, clip_norm=0.0)
    with pytest.raises(GranaryError, match=r"optim\.bias_factor=0\.0: it multiplies optim\.lr and must be positive"):
        AdamConfig(lr=1e-3, bias_factor=0.0)
    with pytest.raises(GranaryError, match=r"optim\.decoder_factor=inf"):
        AdamConfig(lr=1e-3, decoder_factor=float("inf"))
    with pytest.raises(GranaryError, match="no role is declared for b_dec, b_enc: a dictionary names all"):
        Adam(dict(sae.named_parameters()), {name: sae.roles()[name] for name in ("W_enc", "W_dec")}, AdamConfig(lr=1))
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-3))
    with pytest.raises(GranaryError, match="before backward"):
        optimiser.step()
    with pytest.raises(GranaryError, match="does not match"):
        optimiser.load_state_dict({"num_steps": torch.zeros(())})


def matrix_step(config_type, steps=3, num_latents=24, d_model=8, **options):
    """An SAE with free decoder norms after some steps on fixed gradients, and torch's view of W_enc under them."""
    config = SAEConfig(d_model=d_model, d_latent=num_latents, k=2, unit_norm_decoder=False)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    start = sae.W_enc.detach().clone()
    optimiser = make_optimiser(sae, config_type(lr=1e-2, clip_norm=None, **options))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(num_latents, d_model, generator=generator) for _ in range(steps)]
    for grad in grads:
        sae.W_enc.grad = grad.clone()
        optimiser.step()
    return sae, start, grads


def test_signum_is_the_sign_of_the_momentum():
    sae, weight, grads = matrix_step(SignumConfig, momentum=0.8)
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = 0.8 * momentum + 0.2 * grad
        weight = weight - 1e-2 * momentum.sign()
    torch.testing.assert_close(sae.W_enc.detach(), weight)


def test_muon_equals_torch_muon():
    sae, start, grads = matrix_step(MuonConfig, momentum=0.9)
    theirs = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.0, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for grad in grads:
        theirs.grad = grad.clone()
        optimiser.step()
    moved, expected = sae.W_enc.detach() - start, theirs.detach() - start
    assert float((moved - expected).norm() / expected.norm()) < 0.02  # torch's iteration is in bfloat16


def test_muon_brings_singular_values_near_one_whatever_the_cut_of_the_rows():
    sae = SAE(SAEConfig(d_model=8, d_latent=24, k=2))
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)
    optimiser = make_optimiser(sae, MuonConfig(lr=1e-2))
    whole = optimiser.orthogonalise(matrix)
    values = torch.linalg.svdvals(whole)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.25
    halves = []
    for half in (slice(0, 12), slice(12, 24)):
        # The other half's part of every sum, in the order the iteration asks for them.
        sums = []
        optimiser.rows = RowShare(2, lambda tensor, sums=sums: sums.append(tensor.clone()))
        optimiser.orthogonalise(matrix)
        replay = iter(sums)
        optimiser.rows = RowShare(2, lambda tensor, replay=replay: tensor.copy_(next(replay)))
        halves.append(optimiser.orthogonalise(matrix[half]))
    torch.testing.assert_close(torch.cat(halves), whole)


@pytest.mark.parametrize("config_type", [AdamConfig, SignumConfig, MuonConfig])
def test_every_optimiser_keeps_unit_rows_and_resumes_to_the_same_bits(config_type):
    straight, halted = make_sae(), make_sae()
    train(straight, make_optimiser(straight, config_type(lr=1e-2)), 6)
    optimiser = make_optimiser(halted, config_type(lr=1e-2))
    train(halted, optimiser, 3)
    resumed = make_optimiser(halted, config_type(lr=1e-2))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in optimiser.state_dict().items()})
    train(halted, resumed, 3, start=3)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, halted.state_dict()[name]), name
    norms = straight.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_free_decoder_keeps_its_norms():
    sae, _, _ = matrix_step(AdamConfig)
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    make_optimiser(sae, AdamConfig(lr=0.1)).step()
    assert float((sae.W_dec.detach().norm(dim=1) - 1).abs().max()) > 0.01


def test_bfloat16_moments_follow_the_float32_ones():
    plain, half = make_sae(), make_sae()
    train(plain, make_optimiser(plain, AdamConfig(lr=1e-3)), 30)
    optimiser = make_optimiser(half, AdamConfig(lr=1e-3, moments="bfloat16"))
    assert {tensor.dtype for tensor in optimiser.moments["second"].values()} == {torch.bfloat16}
    train(half, optimiser, 30)
    start = make_sae()
    moved = (plain.W_enc - start.W_enc).detach()
    assert float((half.W_enc - plain.W_enc).detach().norm()) < 0.05 * float(moved.norm())


def test_stochastic_rounding_is_right_on_average():
    """A nearest rounding would leave 1.001 at 1 for ever."""
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -1.001, 3e-9):
        rounded = round_stochastically(torch.full((200_000,), value), generator).double()
        assert len(rounded.unique()) == 2
        assert float(rounded.mean()) == pytest.approx(value, rel=1e-4)
    assert round_stochastically(torch.zeros(3), generator).tolist() == [0.0] * 3


def test_weight_average_is_the_written_recursion():
    weight = torch.nn.Parameter(torch.zeros(2))
    average, expected = WeightAverage({"w": weight}, 0.5), torch.zeros(2)
    for step in range(6):
        with torch.no_grad():
            weight += step
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(average.tensors["w"], expected)
    with pytest.raises(GranaryError, match=r"optim\.ema_decay=1"):
        WeightAverage({}, 1.0)


def test_spike_guard_refuses_what_is_out_of_the_ordinary():
    guard, norm = SpikeGuard(2.0), torch.tensor(1.0)
    assert guard.admits(torch.tensor(9.0), norm)  # nothing to compare with yet
    assert not guard.admits(torch.tensor(float("nan")), norm)
    assert not guard.admits(torch.tensor(1.0), torch.tensor(float("inf")))
    for _ in range(WINDOW):
        assert guard.admits(torch.tensor(1.0), norm)
    assert not guard.admits(torch.tensor(2.1), norm)
    assert guard.admits(torch.tensor(1.9), norm)
    assert guard.refused == 3
    other = SpikeGuard(2.0)
    other.restore(json.loads(json.dumps(guard.state())))
    assert not other.admits(torch.tensor(2.1), norm)
    for _ in range(PATIENCE - 2):
        assert not other.admits(torch.tensor(float("nan")), norm)
    with pytest.raises(GranaryError, match="32 steps in a row were left out"):
        other.admits(torch.tensor(float("nan")), norm)
    with pytest.raises(GranaryError, match=r"optim\.spike_factor=1"):
        SpikeGuard(1.0)


def test_adam8bit_is_bitsandbytes_own():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sae = SAE(SAEConfig(d_model=64, d_latent=128, k=2, unit_norm_decoder=False))
    theirs = torch.nn.Parameter(sae.W_enc.detach().clone())
    reference = bitsandbytes.optim.Adam8bit([theirs], lr=1e-2, min_8bit_size=0)
    optimiser = make_optimiser(sae, Adam8bitConfig(lr=1e-2, clip_norm=None))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(128, 64, generator=generator)
        sae.W_enc.grad, theirs.grad = grad.clone(), grad.clone()
        optimiser.step()
        reference.step()
    torch.testing.assert_close(sae.W_enc.detach(), theirs.detach())
    assert optimiser.moments["second"]["W_enc"].dtype == torch.uint8


def test_adam8bit_follows_adam_and_keeps_unit_rows():
    pytest.importorskip("bitsandbytes")
    plain, small = make_sae(d=8, num_latents=64), make_sae(d=8, num_latents=64)

    def run(sae, optimiser):
        for step in range(20):
            sae.losses(batch(step, d=8)).total.backward()
            optimiser.step()

    run(plain, make_optimiser(plain, AdamConfig(lr=1e-3)))
    optimiser = make_optimiser(small, Adam8bitConfig(lr=1e-3))
    run(small, optimiser)
    moved = (plain.W_enc - make_sae(d=8, num_latents=64).W_enc).detach()
    assert float((small.W_enc - plain.W_enc).detach().norm()) < 0.15 * float(moved.norm())
    torch.testing.assert_close(small.W_dec.detach().norm(dim=1), torch.ones(64))
    again = make_optimiser(small, Adam8bitConfig(lr=1e-3))
    again.load_state_dict({name: tensor.clone() for name, tensor in optimiser.state_dict().items()})
    assert torch.equal(again.moments["first_scale"]["W_dec"], optimiser.moments["first_scale"]["W_dec"])


def test_adam8bit_refuses_what_is_no_whole_number_of_blocks_and_a_missing_package(monkeypatch):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(GranaryError, match="one scale per 256 entries"):
        make_optimiser(make_sae(), Adam8bitConfig(lr=1e-3))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(GranaryError, match="needs bitsandbytes: pip install bitsandbytes"):
        make_optimiser(make_sae(), Adam8bitConfig(lr=1e-3))
