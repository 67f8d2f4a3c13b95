"""The optimum against the gradient's definition, a slow optimiser, and cases that are known."""

import pytest
import torch

from stage_eval.supervised.logistic import RIDGE, Probe, fit


def loss(x_ND: torch.Tensor, is_yes_N: torch.Tensor, weight_D: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Class-weighted cross-entropy and the ridge, written out."""
    logits_N = x_ND @ weight_D + bias
    yes = is_yes_N.double().mean()
    share_N = torch.where(is_yes_N, 0.5 / yes, 0.5 / (1 - yes))
    entropy_N = torch.nn.functional.binary_cross_entropy_with_logits(logits_N, is_yes_N.double(), reduction="none")
    scale_D = x_ND.std(0, correction=0)
    return (share_N * entropy_N).sum() + RIDGE / 2 * (weight_D * scale_D).square().sum()


def planted(count: int, width: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count + width)
    x_ND = torch.randn(count, width, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, width) + 3
    is_yes_N = torch.rand(count, generator=generator) < share
    x_ND[is_yes_N, 0] += 0.02
    return x_ND, is_yes_N


@pytest.mark.parametrize(("count", "width", "share"), [(63, 1, 0.5), (400, 7, 0.1), (50, 80, 0.5)])
def test_the_gradient_vanishes_and_no_neighbour_is_better(count: int, width: int, share: float) -> None:
    x_ND, is_yes_N = planted(count, width, share)
    probe = fit(x_ND.float(), is_yes_N)
    x_ND = x_ND.float().double()
    weight = probe.weight_D.clone().requires_grad_()
    bias = torch.tensor(probe.bias, dtype=torch.float64, requires_grad=True)
    least = loss(x_ND, is_yes_N, weight, bias)
    least.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert (weight.grad / x_ND.std(0, correction=0)).abs().max() < 1e-3 * count**0.5
    assert abs(float(bias.grad)) < 1e-3 * count**0.5
    slow_weight = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    slow_bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    scaled = (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)
    optimiser = torch.optim.LBFGS([slow_weight, slow_bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        now = loss(scaled, is_yes_N, slow_weight, slow_bias)
        now.backward()
        return now

    optimiser.step(closure)
    slow = loss(scaled, is_yes_N, slow_weight, slow_bias).detach()
    assert float(least.detach()) == pytest.approx(float(slow), rel=1e-6)


def test_what_can_be_told_apart_is() -> None:
    x_ND = torch.tensor([[0.0, 1.0], [0.1, 1.0], [2.0, 1.0], [2.1, 1.0]])  # the second feature never varies
    is_yes_N = torch.tensor([False, False, True, True])
    probe = fit(x_ND, is_yes_N)
    assert ((probe.logits(x_ND) > 0) == is_yes_N).all()
    assert probe.weight_D[1] == 0


def test_features_in_other_units_give_the_same_answers() -> None:
    x_ND, is_yes_N = planted(300, 4, 0.3)
    one, other = fit(x_ND, is_yes_N), fit(x_ND * 1000 - 7, is_yes_N)
    assert torch.allclose(one.logits(x_ND), other.logits(x_ND * 1000 - 7), atol=1e-6)
    assert isinstance(one, Probe)
