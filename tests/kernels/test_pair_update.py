"""Gradients kept as pairs: the same steps as with gradients in ``.grad``, whatever a gradient is made of."""

import gc
import weakref

import pytest
import torch

from shared.kernels import AdamStep, Compute, DeadRows, PairGradient, PairOrder, auxk_error, row_grad, take_rows
from shared.kernels.auxk import blocks
from shared.kernels.linear import FAST_BFLOAT16
from shared.kernels.row_update import torch_ as row_update_in_tiles
from shared.sae.optim import AdamConfig, make_optimiser
from tests.learning import LearningSAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(kernels, pair_gradients, steps=2, parts=1, own_loss=False, **overrides):
    """Parameters and gradient norms after a few steps with dead latents."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, 12, generator=rng).to(DEVICE)
    fields = {"d_model": 12, "d_latent": 40, "k": 4, "auxk_alpha": 0.5, **overrides}
    sae = LearningSAE(kernels=kernels, generator=rng, **fields).to(DEVICE)
    sae.initialise(None, x)
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-2, clip_norm=0.01), pair_gradients=pair_gradients)
    sae.objective.pair_gradients = optimiser.pairs if pair_gradients else None
    norms = []
    for _ in range(steps):
        optimiser.zero_grad()
        for part in x.split(8 // parts):
            loss = sae.losses(part, torch.tensor([1, 7, 30], device=DEVICE)).total / parts
            (loss + sae.W_dec.sum() if own_loss else loss).backward()
        if pair_gradients and not own_loss:
            assert sae.W_enc.grad is None
            assert sae.W_dec.grad is None
        norms.append(optimiser.step())
    return [*sae.parameters(), torch.stack(norms)]


CASES = {
    "plain": {},
    "multi-topk": {"multi_topk_weight": 0.125},
    "micro-batches": {"parts": 2},
    "no auxk": {"auxk_alpha": 0.0},
    "another loss": {"own_loss": True},
}
RUNS = [("torch", name) for name in CASES]
RUNS += [pytest.param("triton", name, marks=pytest.mark.slow) for name in ("plain", "multi-topk")]


@pytest.mark.parametrize(("kernels", "case"), RUNS, indirect=["kernels"])
def test_steps_equal_those_with_dense_gradients(kernels, case):
    given = {"steps": 2 if kernels == "torch" else 1, **CASES[case]}  # the interpreter is slow
    expected = trained("reference", pair_gradients=False, **given)
    for result, truth in zip(trained(kernels, pair_gradients=True, **given), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=2e-4, atol=2e-5)


def test_zero_grad_empties_the_pairs():
    gradient = PairGradient()
    gradient.add_rows(torch.tensor([1]), torch.ones(1, 2))
    assert gradient
    gradient.clear()
    assert not gradient
    assert not gradient.dense(torch.ones(3, 2), "torch").any()


def test_no_pair_at_all_is_a_gradient_of_zero(kernels):
    weight, indices = torch.ones(6, 5, device=DEVICE), torch.full((2, 3), -1, device=DEVICE)
    gradient = PairGradient()
    gradient.add(torch.ones(2, 3, device=DEVICE), indices, PairOrder(indices, 6), torch.ones(2, 5, device=DEVICE))
    assert float(gradient.squared_norm(weight, kernels=kernels)) == 0
    state = [weight.clone(), torch.ones_like(weight), torch.ones_like(weight)]
    adam = AdamStep(0.1, (0.5, 0.5), 1e-8, step=1, clip=torch.ones((), device=DEVICE), unit_rows=False)
    gradient.update(*state, adam, kernels=kernels)
    # Adam of a row that nobody touched: the moments decay, and the row still moves by them.
    assert torch.equal(state[1], torch.full_like(weight, 0.5))
    assert torch.equal(state[2], torch.full_like(weight, 0.5))
    torch.testing.assert_close(state[0], weight - 0.1)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_rows_equal_the_whole_gradient(unit_rows, dtype, monkeypatch):
    """Tiles of 4 of 18 latents, of which some have no pair, some a further row, and the last tile has 2."""
    rng = torch.Generator().manual_seed(0)
    monkeypatch.setattr(row_update_in_tiles, "TILE_ELEMENTS", 4 * 6)
    indices = torch.randint(-1, 14, (7, 3), generator=rng)
    indices[indices == 5] = 9
    values, rows = (torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((7, 3), (7, 6)))
    latents, extra = torch.tensor([17, 3, 4, 16, 5]), torch.randn(5, 6, generator=rng, dtype=dtype)
    weight = torch.nn.functional.normalize(torch.randn(18, 6, generator=rng, dtype=dtype), dim=1)
    found = []
    for kernels in ("reference", "torch"):
        gradient = PairGradient()
        gradient.add(values, indices, PairOrder(indices, 18), rows)
        gradient.add_rows(latents, extra)
        state = [weight.clone(), weight / 8, weight.square() / 8]
        square = gradient.squared_norm(weight, kernels=kernels)
        adam = AdamStep(0.1, (0.8, 0.95), 1e-3, step=3, clip=0.5 / square.sqrt(), unit_rows=unit_rows)
        gradient.update(*state, adam, kernels=kernels)
        assert not gradient
        found.append([square, *state])
    for actual, truth in zip(*found, strict=True):
        torch.testing.assert_close(actual, truth)


def test_take_rows_hands_its_gradient_over():
    weight = torch.randn(7, 3, requires_grad=True)
    gradient, latents = PairGradient(), torch.tensor([5, 2])
    (take_rows(weight, latents, gradient) * torch.tensor([[1.0], [2.0]])).sum().backward()
    assert weight.grad is None
    expected = torch.zeros(7, 3)
    expected[5], expected[2] = 1, 2
    assert torch.equal(gradient.dense(weight, "torch"), expected)


def test_the_sum_of_two_terms(kernels):
    rng = torch.Generator().manual_seed(0)
    gradient, expected = PairGradient(), torch.zeros(9, 4)
    for k in (2, 3):
        indices = torch.randint(-1, 9, (5, k), generator=rng)
        values, rows = torch.randn(5, k, generator=rng), torch.randn(5, 4, generator=rng)
        expected += row_grad(values, indices, rows, 9, PairOrder(indices, 9), kernels="reference")
        indices = indices.to(DEVICE)
        gradient.add(values.to(DEVICE), indices, PairOrder(indices, 9), rows.to(DEVICE))
    weight = torch.zeros(9, 4, device=DEVICE)
    torch.testing.assert_close(gradient.squared_norm(weight, kernels=kernels).cpu(), expected.square().sum())


@pytest.mark.parametrize("num_dead", [0, 3, 20])  # none, fewer than k_aux, more
def test_auxk_blocks_equal_the_dense_form(num_dead, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    residual, centred = (torch.randn(11, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    rows = [torch.randn(num_dead, *shape, generator=rng, dtype=torch.float64) for shape in ((6,), (), (6,))]
    rows = [tensor.requires_grad_() for tensor in rows]
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 3 * max(1, num_dead))  # blocks of 3 rows, 2 in the last
    results = []
    for kernels in ("reference", "torch"):
        error = auxk_error(residual, centred, DeadRows.alone(*rows), 5, compute=Compute(kernels))
        results.append([error, *torch.autograd.grad(3 * error, rows)])
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual, truth)


def test_auxk_in_bfloat16_is_close():
    rng = torch.Generator().manual_seed(0)
    residual, centred = (torch.randn(11, 64, generator=rng) for _ in range(2))
    rows = [torch.randn(20, *shape, generator=rng).requires_grad_() for shape in ((64,), (), (64,))]
    exact, rounded = (
        torch.autograd.grad(
            auxk_error(residual, centred, DeadRows.alone(*rows), 20, compute=Compute(dtype=dtype)), rows
        )
        for dtype in ("float32", "bfloat16")
    )
    for actual, truth in zip(rounded, exact, strict=True):
        error = float((actual - truth).norm() / truth.norm())
        assert 0 < error < 2e-2 if FAST_BFLOAT16 else error == 0  # float32 where that is the faster one


@pytest.fixture
def _few_objects():
    """The collector looks at what the test makes alone: at all that other tests left it would look for seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("activation", "pair_gradients"),
    [
        ("topk", True),
        pytest.param("topk", False, marks=pytest.mark.slow),
        pytest.param("batchtopk", True, marks=pytest.mark.slow),
        pytest.param("batchtopk", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.usefixtures("_few_objects")
def test_what_a_step_made_is_freed(kernels, activation, pair_gradients):
    """What autograd's nodes hold must not hold them: no collector could find such a circle."""
    x, dead_R = torch.randn(8, 12, device=DEVICE), torch.tensor([1, 7, 30], device=DEVICE)

    def learn():
        """Weak references to the parameters of an SAE that learnt for some steps."""
        sae = LearningSAE(kernels=kernels, d_model=12, d_latent=40, k=4, activation=activation, auxk_alpha=0.5)
        optimiser = make_optimiser(sae.to(DEVICE), AdamConfig(lr=1e-3), pair_gradients=pair_gradients)
        sae.objective.pair_gradients = optimiser.pairs if pair_gradients else None
        alive = []
        for _ in range(3):
            sae.losses(x, dead_R).total.backward()
            optimiser.step()
            alive.append(alive_tensors())
        assert alive[1] == alive[2]
        return {name: weakref.ref(parameter) for name, parameter in sae.named_parameters()}

    parameters = learn()
    gc.collect()
    assert [name for name, parameter in parameters.items() if parameter() is not None] == []
