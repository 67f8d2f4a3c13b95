"""Modules of a decoder as sites of a store: where they are and how wide, before any weight is read.

A forward of two rows of three tokens on the meta device, which has shapes and no numbers, tells what comes out of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError, told_of
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import capture
from shared.lm.modulepoint import ModulePoint
from shared.lm.places import decoder_blocks, final_norm
from shared.lm.targets import PATTERN, resolve

ROWS, POSITIONS = 2, 3


@dataclass(frozen=True, slots=True)
class ModuleSite:
    """A module whose activations are one row of features per token."""

    point: ModulePoint
    width: int
    layer: int | None
    """The decoder layer that it lies in; None: before the first."""


def module_sites(config: PretrainedConfig, targets: Sequence[str]) -> list[ModuleSite]:
    """The modules of a decoder that `targets` name: paths as of ``attach``, or ``re:`` patterns.

    A path may begin with the name that the trunk has in the whole model (``model.layers.2.mlp``). Raises GranaryError
    for what is not there, for what has no row per token, and for what lies behind the last layer.
    """
    with torch.device("meta"):
        # Of a type that every layer has a kernel for: experts that are computed together have none in float32.
        model = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.bfloat16).eval()
    prefix = f"{model.base_model_prefix}."
    points: dict[ModulePoint, None] = {}
    for target in targets:
        inside = target if target.startswith(PATTERN) else target.removeprefix(prefix)
        for point in resolve(model, inside):
            if isinstance(point, HookPoint):
                raise GranaryError(f"hooks.modules names {point}, a site: give it by hooks.layers and hooks.sites")
            points[point] = None
    layers = {id(module): layer for layer, block in enumerate(decoder_blocks(model)) for module in block.modules()}
    shapes = shapes_of(model, list(points))
    return [ModuleSite(point, width_of(point, shapes[point]), _layer(model, point, layers)) for point in points]


def shapes_of(model: PreTrainedModel, points: Sequence[ModulePoint]) -> dict[ModulePoint, torch.Size]:
    """Shape of the activation at each point; raises GranaryError where the model can't run so, or a module does not."""
    inputs = {
        "input_ids": torch.zeros(ROWS, POSITIONS, dtype=torch.int64, device="meta"),
        "position_ids": torch.arange(POSITIONS, device="meta").expand(ROWS, POSITIONS),
        # One that is made already is not looked into.
        "attention_mask": torch.zeros(ROWS, 1, POSITIONS, POSITIONS, device="meta", dtype=model.dtype),
    }
    with torch.no_grad(), torch.device("meta"), capture(model, points) as captured:
        try:
            model(**inputs, use_cache=False)
        except GranaryError:
            raise
        except Exception as error:  # of the model's own code
            name = model.config.model_type
            raise GranaryError(f"hooks.modules: {name} gives no shapes without weights: {told_of(error)}") from error
    for point in points:
        if point not in captured:
            raise GranaryError(f"hooks.modules: {point} does not run in a forward of {type(model).__name__}")
    return {point: activation.shape for point, activation in captured.items()}


def width_of(point: ModulePoint, shape: torch.Size) -> int:
    """Features of an activation that has a row for each token; raises GranaryError for another."""
    if len(shape) != 3 or shape[:2] != (ROWS, POSITIONS):
        raise GranaryError(
            f"hooks.modules: {point} gives {list(shape)} for {ROWS} rows of {POSITIONS} tokens, not features of each"
            " token: choose another module, or granary.attach and granary.fit"
        )
    return shape[2]


def _layer(model: PreTrainedModel, point: ModulePoint, layers: dict[int, int]) -> int | None:
    module = model.get_submodule(point.path)
    if id(module) in layers:
        return layers[id(module)]
    norm = final_norm(model)
    is_last = norm is not None and module is getattr(*norm)
    if is_last or not isinstance(module, nn.Embedding):
        raise GranaryError(
            f"hooks.modules: {point} lies outside of the decoder layers, which a harvest runs alone: choose a module in"
            " a layer, or resid_post of the last one"
        )
    return None
