"""The skip transcoder: its reconstruction is whole everywhere, and its map starts where it is told."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import SkipTranscoder, load
from shared.sae.latents import SparseLatents
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites, SiteWidths
from tests.variants import OUT, batch, make

D, LATENTS, K = 24, 48, 4


def started(**given: object) -> tuple[Objective, Tensor, Tensor]:
    objective = make("skip_transcoder", **given)
    x_ND, y_ND = batch(objective, 400)
    initialise(objective, None, x_ND, None, y_ND)
    return objective, x_ND, y_ND


def fvu(y_hat_ND: Tensor, y_ND: Tensor) -> float:
    return float((y_hat_ND - y_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum())


def affine_fvu(x_ND: Tensor, y_ND: Tensor) -> float:
    """Of the best affine map from x to y."""
    with_one = F.pad(x_ND, (0, 1), value=1.0).double()
    return fvu(with_one @ torch.linalg.lstsq(with_one, y_ND.double()).solution, y_ND.double())


def test_f04_skip_in_the_error_of_decode_and_forward() -> None:
    """circuit-tracer 76, SAELens's decode: an error without the skip is inflated."""
    objective, x_ND, y_ND = started(skip_init="ridge")
    made = objective.dictionary
    assert isinstance(made, SkipTranscoder)
    latents = made.encode(x_ND)
    normal_ND = (x_ND - made.input_mean) * made.input_scale
    y_hat_ND = latents.to_dense(40) @ made.W_dec + made.b_dec + normal_ND @ made.W_skip.T
    expected = (y_hat_ND / made.output_scale + made.output_mean).detach()
    torch.testing.assert_close(made.decode(latents), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made(x_ND).x_hat, made.decode(latents))
    batched = made.encode(x_ND.view(4, 100, -1))
    torch.testing.assert_close(made.decode(batched).view(400, -1), made.decode(latents))
    losses = objective.losses(x_ND, y_ND)
    assert float(losses.metrics["fvu"]) == pytest.approx(fvu(made(x_ND).x_hat, y_ND), rel=1e-3)
    with pytest.raises(GranaryError, match=r"as encode returns it in \.skipped"):
        made.decode(SparseLatents(latents.values, latents.indices))


def test_f05_skip_is_out_by_in() -> None:
    objective, _, _ = started()
    assert objective.dictionary.state_dict()["W_skip"].shape == (7, 9)


def test_zero_start_is_the_transcoder() -> None:
    skip, x_ND, y_ND = started()
    plain = make("transcoder")
    initialise(plain, None, x_ND, None, y_ND)
    assert not skip.dictionary.state_dict()["W_skip"].any()
    for name, tensor in plain.dictionary.state_dict().items():
        assert torch.equal(tensor, skip.dictionary.state_dict()[name]), name


@pytest.mark.parametrize("normalisation", ["centre_scale", "scale", "none"])
def test_ridge_start_is_the_best_affine_map(normalisation: str) -> None:
    objective, x_ND, y_ND = started(skip_init="ridge", normalisation=normalisation)
    made = objective.dictionary
    best = affine_fvu(x_ND, y_ND)
    latents = made.encode(x_ND[:, :0].new_zeros(1, 9))
    nothing = SparseLatents(torch.zeros(400, 1), torch.full((400, 1), -1), skipped=made.encode(x_ND).skipped)
    assert latents.skipped is not None
    assert fvu(made.decode(nothing), y_ND) <= best + 1e-3
    assert fvu(made(x_ND).x_hat, y_ND) < best


def test_ridge_does_not_fit_noise() -> None:
    """Fewer tokens than dimensions, and nothing to find: the penalty chosen keeps the map small."""
    from shared.sae.learn.skip import ridge

    generator = torch.Generator().manual_seed(0)
    x_MD, y_ME = torch.randn(40, 60, generator=generator), torch.randn(40, 5, generator=generator)
    fresh_MD, fresh_ME = torch.randn(400, 60, generator=generator), torch.randn(400, 5, generator=generator)
    error = (fresh_ME - fresh_MD.double() @ ridge(x_MD, y_ME)).square().sum() / fresh_ME.square().sum()
    assert float(error) < 1.1


def test_takes_what_is_linear() -> None:
    """y = W x + a sparse part: at equal k at most half the error of a transcoder without the map."""
    generator = torch.Generator().manual_seed(3)
    map_DD = torch.randn(D, D, generator=generator) / D**0.5
    read_UD = F.normalize(torch.randn(16, D, generator=generator), dim=1)
    written_UD = F.normalize(torch.randn(16, D, generator=generator), dim=1)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x_ND = torch.randn(rows, D, generator=generator)
        return x_ND, x_ND @ map_DD + 2 * torch.relu(x_ND @ read_UD.T - 1.5) @ written_UD

    scores = {}
    for kind in ("transcoder", "skip_transcoder"):
        generator.manual_seed(4)
        places = (Sites(("in",), ("out",)), SiteWidths((D,), (D,)))
        objective = make(kind, places=places, d_latent=LATENTS, k=K)
        x_ND, y_ND = draw(2048)
        initialise(objective, None, x_ND, None, y_ND)
        optimiser, dead = make_optimiser(objective.dictionary, AdamConfig(lr=1e-2)), DeadLatents(LATENTS, 20_000)
        for _ in range(150):
            x_ND, y_ND = draw(256)
            losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead.mask()))
            losses.total.backward()
            optimiser.step()
            dead.update(losses.fired, len(x_ND))
        x_ND, y_ND = draw(4096)
        scores[kind] = fvu(objective.dictionary(x_ND).x_hat, y_ND)
    assert scores["skip_transcoder"] <= 0.5 * scores["transcoder"], scores


def test_saved_and_loaded(tmp_path: Path) -> None:
    objective, x_ND, _ = started(skip_init="ridge")
    objective.dictionary.save_pretrained(tmp_path / "sae", training=objective.learning.to_dict())
    loaded = load(tmp_path / "sae")
    assert isinstance(loaded, SkipTranscoder)
    assert torch.equal(loaded(x_ND).x_hat, objective.dictionary(x_ND).x_hat)


def test_wrong_words_are_one_line() -> None:
    with pytest.raises(GranaryError, match=r"variant\.skip_init='rigde': choose from zero, ridge"):
        make("skip_transcoder", skip_init="rigde")
    with pytest.raises(GranaryError, match=r"a skip from layers\.2\.mlp_out to itself would copy it"):
        make("skip_transcoder", places=(Sites.of(OUT), SiteWidths((9,), (9,))))
