"""Layers that gradient checkpointing runs again do what they did in their own forward, whichever was the last."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import LlamaForCausalLM

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.lm import splice_through
from shared.lm.hookpoint import HookPoint
from shared.lm.recomputation import FUNCTION
from tests.cached import checkpoint_layers
from tests.splicing import BOS, HOOK, VOCAB, D, activation, prompt, tiny_llama
from tests.unit.intervene.test_following import F, sae  # noqa: F401 (a fixture)

EDITS = [Edit([3], "add", 2.0), Edit([7], "multiply", -3.0)]
Gradients = dict[str, Tensor]


def batches(shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Prompts of these rows and positions; the last row of each is padded on the left, further in each batch."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for number, (rows, length) in enumerate(shapes):
        tokens = torch.randint(2, VOCAB, (rows, length), generator=generator)
        tokens[:, 0] = BOS
        mask = torch.ones_like(tokens)
        tokens[-1, : 2 * number], mask[-1, : 2 * number] = 0, 0
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found


def trainable(reentrant: bool | None = None) -> LlamaForCausalLM:
    """A model in training; `reentrant` None: nothing is computed a second time."""
    model = tiny_llama().requires_grad_(True).train()
    if reentrant is not None:
        checkpoint_layers(model, reentrant=reentrant)
    return model


def gradients(model: LlamaForCausalLM, run: Callable[..., Any], inputs: list[dict[str, Tensor]]) -> Gradients:
    """Of the sum of the losses of several forwards, by one backward pass."""
    losses = [run(**one, labels=one["input_ids"], use_cache=False).loss for one in inputs]
    torch.stack(losses).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shapes", [[(2, 7), (3, 5), (1, 9)], [(2, 6), (2, 6)]])
def test_several_forwards_before_one_backward(
    sae: Any,  # noqa: F811
    shapes: list[tuple[int, int]],
    reentrant: bool,
) -> None:
    inputs, found = batches(shapes), []
    for checkpointing in (None, reentrant):
        model = trainable(checkpointing)
        with SplicedModel(model, sae, HOOK, edits=EDITS, keep_error=False) as spliced:
            found.append(gradients(model, spliced, inputs))
        last = inputs[-1]
        real = last["attention_mask"].bool()
        wanted = sae.encode(activation(model.eval(), **last)).to_dense(F)
        torch.testing.assert_close(spliced.features.before.to_dense(F)[real], wanted[real])
        assert torch.equal(spliced.features.applied, real & (last["input_ids"] != BOS))
    assert_same(*found)


@contextmanager
def mixed(model: LlamaForCausalLM) -> Iterator[None]:
    """A splice from layer 0 to the MLPs of layers 1 and 2."""
    weight = torch.randn(D, 2 * D, generator=torch.Generator().manual_seed(0))
    writes = [HookPoint(1, "mlp_out"), HookPoint(2, "mlp_out")]
    with splice_through(model, [HookPoint(0, "mlp_in")], writes, lambda x: torch.tanh(x @ weight)):
        yield


def test_a_splice_from_layer_to_layer() -> None:
    found = []
    for checkpointing in (None, False):
        model = trainable(checkpointing)
        with mixed(model):
            found.append(gradients(model, model, batches([(2, 7), (3, 5)])))
    assert_same(*found)
    model = trainable(reentrant=True)
    with mixed(model), pytest.raises(GranaryError, match="'use_reentrant': False"):
        model(prompt(), use_cache=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_backward_pass_behind_the_context_is_refused(sae: Any, reentrant: bool) -> None:  # noqa: F811
    model, tokens = trainable(reentrant), prompt()
    with SplicedModel(model, sae, HOOK, edits=EDITS) as spliced:
        loss = spliced(tokens, labels=tokens, use_cache=False).loss
    with pytest.raises(GranaryError, match="into one `with`"):
        loss.backward()
    model(tokens, labels=tokens, use_cache=False).loss.backward()  # without a splice all is as ever


def test_splices_that_end_in_any_order_leave_the_model_as_it_was(sae: Any) -> None:  # noqa: F811
    model = trainable(reentrant=False)
    layers = model.model.layers
    before = [getattr(layer, FUNCTION) for layer in layers]
    first, second = ExitStack(), ExitStack()
    first.enter_context(SplicedModel(model, sae, HOOK, edits=EDITS))
    second.enter_context(SplicedModel(model, sae, "layers.0.resid_post", edits=EDITS))
    gradients(model, model, batches([(2, 7), (3, 5)]))
    first.close()
    gradients(model, model, batches([(2, 7), (3, 5)]))
    second.close()
    assert [getattr(layer, FUNCTION) for layer in layers] == before


def test_checkpointing_that_is_not_the_models_own_is_followed_or_refused(sae: Any) -> None:  # noqa: F811
    """torch's wrapper of a layer: one forward and its backward are right, two before one backward are an error."""
    hook, found = "layers.1.mlp_out", []
    for wrapped in (False, True):
        model = trainable()
        if wrapped:
            for number, layer in enumerate(model.model.layers):
                model.model.layers[number] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        with SplicedModel(model, sae, hook, edits=EDITS) as spliced:
            made = gradients(model, spliced, batches([(2, 7)]))
            found.append({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in made.items()})
            if wrapped:
                for shapes in ([(2, 7), (3, 5)], [(2, 6), (2, 6)]):
                    with pytest.raises(GranaryError, match="must follow its own forward"):
                        gradients(model, spliced, batches(shapes))
    assert_same(*found)
