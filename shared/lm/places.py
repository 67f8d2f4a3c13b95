"""From the name of a hook to a module of a loaded model: where its decoder layers, its final norm and its sites are.

A hook point is found by module, never by editing the model's code. The ends of a layer, `resid_pre` and `resid_post`,
are what goes into it and comes out of it in every family; what lies between is in the table of `shared.lm.families`.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.families import FAMILIES, Family, family_of
from shared.lm.hookpoint import HookPoint
from shared.lm.modulepoint import ModulePoint, Point, Side

# What the norm after the last layer is called where the layers lie: `norm` of Llama, `ln_f` of GPT-2, `norm_f` of
# Mamba.
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")


class Location(NamedTuple):
    """Where an activation passes: into or out of a module."""

    module: nn.Module
    side: Side
    select: int | str | None = None
    """Which of several arguments or results; None: the only one, or the first."""
    axis: int | None = -1
    """Which axis holds the features; None: the last, where there is no doubt."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a transformers model, with or without its LM head.

    Raises GranaryError when there is none to be found.
    """
    holder, name = _find_blocks(model)
    blocks = getattr(holder, name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def final_norm(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the norm after the last layer, and the norm's attribute name there; None without one."""
    holder, _ = _find_blocks(model)
    for name in FINAL_NORMS:
        if isinstance(getattr(holder, name, None), nn.Module):
            return holder, name
    return None


def locate(model: nn.Module, point: Point) -> Location:
    """Where `point` is in `model`; raises GranaryError where the model has no such place."""
    return _locate_module(model, point) if isinstance(point, ModulePoint) else _locate_hook(model, point)


def _locate_module(model: nn.Module, point: ModulePoint) -> Location:
    module = find_module(model, point.path)
    if module is None:
        raise GranaryError(f"{type(model).__name__} has no module {point.path}")
    axis = point.axis
    if axis is None and isinstance(module, _ConvNd):
        axis = -1 - len(module.kernel_size)
    elif axis is None and isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding):
        axis = -1
    return Location(module, point.side, point.select, axis)


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of the model, or of its trunk, by whose paths a store names modules; None without one."""
    for root in (without_wrappers(model), trunk(model)):
        with suppress(AttributeError):
            return root.get_submodule(path)
    return None


def _locate_hook(model: nn.Module, hook: HookPoint) -> Location:
    blocks = decoder_blocks(model)
    if hook.layer == len(blocks) and hook.site == "resid_pre":
        _check_stream(model, HookPoint(hook.layer - 1, "resid_post"))
        return Location(blocks[-1], "output")
    if hook.layer >= len(blocks):
        raise GranaryError(f"{hook} is not in the model: it has {len(blocks)} layers, 0 to {len(blocks) - 1}")
    block = blocks[hook.layer]
    if hook.site == "resid_pre":
        return Location(block, "input")
    if hook.site == "resid_post":
        _check_stream(model, hook)
        return Location(block, "output")
    config = text_stack(model).config
    assert isinstance(config, PretrainedConfig)
    path = known_family(config, hook).site(hook.site)
    if path is None:
        raise GranaryError(
            f"{hook}: attention and MLP of {config.model_type} work side by side on resid_pre, so there is no stream"
            " between them: choose resid_pre or resid_post"
        )
    return Location(block.get_submodule(path.module), path.side)


def _check_stream(model: nn.Module, hook: HookPoint) -> None:
    """Raise GranaryError where what comes out of the layer is not yet the stream: DeepStack (Qwen3-VL) adds features of
    the images behind each of the first layers."""
    if hook.layer < deepstack_layers(getattr(trunk(model), "config", None)):
        raise GranaryError(
            f"{hook}: behind layer {hook.layer} the model adds features of its images to the stream (DeepStack): choose"
            f" layers.{hook.layer + 1}.resid_pre, which has them"
        )


def deepstack_layers(config: object) -> int:
    """Behind how many of its first layers a model adds features of images to the stream (DeepStack)."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def known_family(config: PretrainedConfig, hook: HookPoint) -> Family:
    """The table's row for the model; raises GranaryError, naming `hook`, where it has none."""
    family = family_of(config)
    if family is None:
        raise GranaryError(
            f"{hook}: attention and MLP hooks are known for {', '.join(FAMILIES)}, not for {config.model_type};"
            " resid_pre and resid_post work there"
        )
    return family


def trunk(model: nn.Module) -> nn.Module:
    """The model without its head."""
    model = without_wrappers(model)
    return model.base_model if isinstance(model, PreTrainedModel) else model


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model itself, of one that peft or torch.compile has put another module around."""
    while True:
        base = getattr(model, "get_base_model", None)  # of peft
        inner = base() if callable(base) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def body_of(model: nn.Module, points: Iterable[Point]) -> nn.Module:
    """The module whose forward is the forward of all `points`: the trunk, or where one lies outside of it, as a head
    does, the whole model."""
    body = trunk(model)
    inside = {id(module) for module in body.modules()}
    is_inside = all(isinstance(point, HookPoint) or id(locate(model, point).module) in inside for point in points)
    return body if is_inside else without_wrappers(model)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter, the CPU for one without."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def text_stack(model: nn.Module) -> nn.Module:
    """What holds the decoder layers: the trunk, or in one that reads images or sound beside text, its text model."""
    body = trunk(model)
    if not isinstance(body, PreTrainedModel) or body.config.get_text_config() is body.config:
        return body
    decoder = body.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else body


def _find_blocks(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name there.

    It is called `layers` in most models. Elsewhere (`h` of GPT-2, `decoder.layers` of OPT) it is the one list of as
    many modules as the configuration has layers.
    """
    body = text_stack(model)
    if isinstance(getattr(body, "layers", None), nn.ModuleList):
        return body, "layers"
    count = getattr(getattr(body, "config", None), "num_hidden_layers", None)
    found = []
    for path, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and path.count(".") <= 1:
            found.append(path)
    if len(found) != 1:
        seen = ", ".join(found) if found else "no list of as many modules as it has layers"
        raise GranaryError(
            f"{type(model).__name__} has no list of decoder layers that hooks could be placed on: expected one called"
            f" layers, or one list of {count} modules, and found {seen}"
        )
    parent, _, name = found[0].rpartition(".")
    return body.get_submodule(parent), name
