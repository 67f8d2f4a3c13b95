"""From what a user writes to places in a model, and what is said where there are none."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.lm.modulepoint import ModulePoint
from shared.lm.targets import point_of, resolve
from tests.modules import MLP, llava
from tests.splicing import prompt, tiny_llama


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("a.0.b", ModulePoint("a.0.b")),
        ("a:in", ModulePoint("a", "input")),
        ("a:out[1]", ModulePoint("a", "output", 1)),
        ("a:in[hidden_states]@1", ModulePoint("a", "input", "hidden_states", 1)),
        ("a@-2", ModulePoint("a", axis=-2)),
        ("a:out[0]", ModulePoint("a", "output", 0)),
    ],
)
def test_a_module_point_is_what_it_was_parsed_from(name, point):
    assert ModulePoint.parse(name) == point == point_of(name)
    assert str(point) == name


def test_names_of_hooks_and_of_modules():
    model = tiny_llama()
    assert resolve(model, "layers.1.resid_post") == [HookPoint(1, "resid_post")]
    assert resolve(model, "model.layers.1.mlp:out") == [ModulePoint("model.layers.1.mlp")]
    assert resolve(model.model, "layers.1.mlp") == [ModulePoint("layers.1.mlp")]
    assert point_of("layers.1.resid_post") == HookPoint(1, "resid_post")


def test_a_module_that_is_called_like_a_hook_goes_before_it():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"mlp_out": nn.Linear(2, 2)})])

    assert resolve(Named(), "layers.0.mlp_out") == [ModulePoint("layers.0.mlp_out")]


def test_regex_matches_vision_and_text():
    found = [str(point) for point in resolve(llava(), r"re:.*layers\.1\.mlp:in")]
    assert len(found) == 2
    assert found[0].startswith("model.vision_tower")
    assert found[0].endswith("layers.1.mlp:in")
    assert found[1] == "model.language_model.layers.1.mlp:in"


def test_a_module_of_two_names_is_meant_once():
    shared = nn.Linear(2, 2)
    assert resolve(nn.Sequential(shared, nn.ReLU(), shared), "re:[02]") == [ModulePoint("0")]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("1.mlp", "has no module 1.mlp: did you mean model.layers.1.mlp"),
        ("model.layers.1.mpl", "did you mean model.layers.1.mlp"),
        ("layers.1.resid_pots", "did you mean layers.1.resid_post"),
        ("layers.7.resid_post", "layers.7.resid_post is not in the model: it has 3 layers"),
        ("xyzzy", r"has no module xyzzy: model.named_modules\(\) lists what there is"),
        ("re:down_proj", "matches no whole path .*did you mean model.layers.0.mlp.down_proj, "),
        ("re:.*mlp.down_prj", r"did you mean model.layers.\d.mlp.down_proj"),
        ("re:(", "no regular expression"),
        ("", "needs a name"),
    ],
)
def test_no_match_lists_near_names(target, told):
    with pytest.raises(GranaryError, match=told):
        resolve(tiny_llama(), target)


def test_a_model_without_decoder_layers_has_modules_alone():
    with pytest.raises(GranaryError, match=r"MLP has no module layers\.0\.resid_post"):
        resolve(MLP(), "layers.0.resid_post")


def test_a_module_point_is_the_hook_point_of_the_same_place():
    model, tokens = tiny_llama(), prompt()
    layer, hook = ModulePoint("model.layers.1"), HookPoint(1, "resid_post")
    with capture(model, [layer, hook, ModulePoint("model.layers.1", "input")]) as captured, torch.no_grad():
        model(tokens)
    assert captured[layer] is captured[hook]
    assert captured[ModulePoint("model.layers.1", "input")].shape == captured[hook].shape


class Odd(nn.Module):
    """Modules whose results are of every form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = Inner(form), form

    def forward(self, x: Tensor) -> Any:
        return self.inner(1, states=x, mask=None)


class Inner(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, number: int, *, states: Tensor, mask: Tensor | None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        match self.form:
            case "tuple":
                return (states, states * 2)
            case "none_first":
                return [None, states]
            case "mapping":
                return {"a": states, "b": states * 2}
            case "model_output":
                return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))
            case _:
                return None


def seen(form: str, target: str) -> Tensor:
    model = Odd(form)
    (point,) = resolve(model, target)
    with capture(model, [point]) as captured:
        model(torch.arange(6.0).view(2, 3))
    return captured[point]


@pytest.mark.parametrize(
    ("form", "target", "factor"),
    [
        ("tuple", "inner", 1),
        ("tuple", "inner:out[1]", 2),
        ("none_first", "inner:out[1]", 1),
        ("mapping", "inner", 1),
        ("mapping", "inner:out[b]", 2),
        ("mapping", "inner:out[1]", 2),
        ("model_output", "inner", 1),
        ("model_output", "inner:out[last_hidden_state]", 1),
        ("nothing", "inner:in[states]", 1),
    ],
)
def test_target_is_tuple_model_output_or_named_input(form, target, factor):
    assert torch.equal(seen(form, target), factor * torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    ("form", "target", "told"),
    [
        ("none_first", "inner", r"no tensor of activations that comes out of the Inner: choose :out[1]"),
        ("model_output", "inner:out[1]", r"at [1] of what comes out of the Inner: choose :out[last_hidden_state]"),
        ("mapping", "inner:out[c]", r"choose :out[a] or :out[b]"),
        ("nothing", "inner", "no tensor of activations that comes out of the Inner"),
        ("nothing", "inner:in", "no tensor of activations that goes into the Inner"),
        ("nothing", "inner:in[mask]", "at [mask] of what goes into the Inner: choose :in[states]"),
    ],
)
def test_what_is_no_tensor_is_said(form, target, told):
    with pytest.raises(GranaryError, match=re.escape(told)):
        seen(form, target)


def test_the_axis_of_features_is_asked_for_where_it_is_in_doubt():
    model = nn.Sequential(nn.ReLU())
    for target, told in (("0", "write @1 after its name"), ("0@4", "without an axis 4")):
        (point,) = resolve(model, target)
        with capture(model, [point]), pytest.raises(GranaryError, match=told):
            model(torch.zeros(2, 3, 4, 5))
