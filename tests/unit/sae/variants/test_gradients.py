"""Every kind of dictionary with every activation that it claims, against dense float64: the loss and each gradient."""

from typing import Any

import pytest
import torch

from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.sites import Sites, SiteWidths
from tests.dense import assert_same_gradients, dense_loss
from tests.variants import ACTIVATIONS, batch, make

SIX = (
    Sites(tuple(f"layers.{n}.mlp_in" for n in range(3)), tuple(f"layers.{n}.mlp_out" for n in range(3))),
    SiteWidths((9, 6, 5), (6, 6, 6)),
)
"""A CLT's, with written sites of one width, as tying per source wants them."""
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("transcoder", {"activation": activation}) for activation in ACTIVATIONS),
    *(("skip_transcoder", {"activation": activation}) for activation in ACTIVATIONS),
    *(
        ("crosscoder", {"activation": activation, "gate": gate, "pre_bias": gate == "sum"})
        for activation in ACTIVATIONS
        for gate in ("joint", "sum")
    ),
    ("crosscoder", {"activation": "relu", "unit_norm_decoder": False}),
    ("crosscoder", {"places": (Sites(("a",), ("b", "c")), SiteWidths((6,), (5, 8))), "gate": "sum"}),
    *(
        ("clt", {"activation": activation, "k_scope": scope})
        for activation in ("topk", "batchtopk")
        for scope in ("all", "layer")
    ),
    ("clt", {"activation": "relu", "penalty": "l1", "unit_norm_decoder": False}),
    ("clt", {"activation": "jumprelu"}),
    ("clt", {"activation": "jumprelu", "penalty": "tanh", "unit_norm_decoder": False}),
    ("clt", {"activation": "jumprelu", "penalty": "l0"}),
    *(
        ("clt", {"tying": tying, "places": SIX, **given})
        for tying in ("per_source", "per_target")
        for given in (
            {"activation": "batchtopk"},
            {"activation": "jumprelu"},
            {"activation": "relu", "penalty": "l1", "unit_norm_decoder": False},
        )
    ),
    ("skip_transcoder", {"skip_init": "ridge", "normalisation": "scale"}),
    *(("molt", {"activation": activation}) for activation in ACTIVATIONS),
    ("molt", {"activation": "jumprelu", "penalty": "l0", "normalisation": "scale"}),
    ("molt", {"activation": "relu", "unit_norm_decoder": False}),
    ("molt", {"auxk_k": 1, "normalisation": "none"}),
    *((kind, {"auxk_k": 2, "auxk_slope": 0.3}) for kind in ("molt", "clt", "crosscoder")),
]


@pytest.mark.parametrize(("kind", "given"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_value_and_every_gradient(kind: str, given: dict[str, Any]) -> None:
    objective = make(kind, torch.float64, auxk_alpha=0.5, **given)
    made = objective.dictionary
    x_ND, y_ND = batch(objective)
    initialise(objective, None, x_ND, None, y_ND)
    with torch.no_grad():  # where the start leaves nothing to learn a gradient would be 0
        for number, parameter in enumerate(made.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
    dead_F = torch.arange(made.config.d_latent) % 7 == 0
    losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead_F))
    expected = dense_loss(made, objective.learning, x_ND, y_ND, dead_F)
    assert losses.metrics["auxk"] > 0
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
    assert_same_gradients(made, losses.total, expected)
