"""The replacement model of a prompt against the library's own splice, and plain formulas of its scores."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import Tensor

from shared.lm import load_causal_lm, splice_through
from shared.lm.hookpoint import HookPoint
from shared.sae import Dictionary
from stage_trace.spliced import splice_all
from stage_trace.trace import trace
from tests.tracing import bundled_transcoder, make_clt

TEXT = "def f(x):\n    return"


def made_of(kind: str) -> list[Dictionary]:
    if kind == "clt":
        return [make_clt(4, width=128, latents=48)]
    return [bundled_transcoder(layer, skip=kind == "skip", threshold=0.8) for layer in (0, 2, 3)]


@pytest.mark.parametrize("kind", ["plain", "skip", "clt"])
def test_the_replacement_model_is_the_model_with_all_dictionaries_spliced_in(kind: str) -> None:
    """Layers without a dictionary, and BOS, keep their MLPs."""
    model = load_causal_lm("bundled")
    made = made_of(kind)
    graph = trace(model, made, TEXT)
    assert graph.session is not None
    found = splice_all(graph.session)

    tokens_1T = graph.session.tokens_T[None]
    where_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
    where_1T[:, 0] = False

    def replace(one: Dictionary, x: Tensor) -> Tensor:
        return one(x).x_hat

    with ExitStack() as stack, torch.no_grad():
        clean = model(tokens_1T).logits[0].log_softmax(-1)[1:]
        for one in made:
            assert one.sites is not None
            reads, writes = (list(map(HookPoint.parse, names)) for names in (one.sites.reads, one.sites.writes))
            widths = [128] * len(reads)
            stack.enter_context(
                splice_through(
                    model, reads, writes, partial(replace, one), where=where_1T, widths=widths, read_widths=widths
                )
            )
        after = model(tokens_1T).logits[0].log_softmax(-1)[1:]
    kl_N = (clean.exp() * (clean - after)).sum(-1)
    assert found.kl == pytest.approx(float(kl_N.mean()), rel=1e-3)
    assert found.kl > 0.01
    assert found.kl_last == pytest.approx(float(kl_N[-1]), rel=1e-3)
    assert (found.agreeing, found.positions) == (int((clean.argmax(-1) == after.argmax(-1)).sum()), len(kl_N))
    said = tokens_1T[0, 2:, None]
    assert found.loss_of_model == pytest.approx(-float(clean[:-1].gather(1, said).mean()), rel=1e-4)
    assert found.loss == pytest.approx(-float(after[:-1].gather(1, said).mean()), rel=1e-3)
    assert found.said == int(after[-1].argmax())
    assert found.probability == pytest.approx(float(after[-1].exp().max()), rel=1e-3)


def test_a_prompt_of_one_token_predicts_none() -> None:
    graph = trace("bundled", made_of("plain"), "def")
    assert graph.session is not None
    found = splice_all(graph.session)
    assert (found.loss, found.loss_of_model, found.positions) == (None, None, 1)
    assert found.kl == found.kl_last > 0
