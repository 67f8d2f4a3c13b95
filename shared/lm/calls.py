"""What a forward of a model is called with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from shared.lm.places import device_of

# What a forward calls the cache of keys and values: newer versions of transformers, and older ones.
CACHES = ("cache", "past_key_values")


# What newer versions of transformers ask a model before they encode its images ahead of the first forward.
ENCODES_AHEAD = "_supports_mm_encoder_outputs"


@dataclass(frozen=True)
class Masked:
    """A batch of which not all rows count, as where some are padding of a model that does not take token ids."""

    inputs: Any
    """What the model is called with."""
    mask: Tensor
    """bool, one for each row of activations, in the shape that they have before their features: true: it counts."""


def call(model: nn.Module, batch: Any) -> None:
    """The model's forward on a batch: a mapping gives named arguments, a tuple or list those in order, else the one.

    Tensors go to the model's device.
    """
    device = device_of(model)

    def placed(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    args, kwargs = arguments_of(batch)
    model(*map(placed, args), **{name: placed(value) for name, value in kwargs.items()})


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a batch gives in order, and by name."""
    if isinstance(batch, Masked):
        batch = batch.inputs
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a forward, each under the name of its parameter, however it is given."""
    if not args:
        return kwargs
    inside = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, one in signature(module.forward).parameters.items() if one.kind in inside]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache that a forward is given, of its arguments by name; None without one."""
    return next((named[name] for name in CACHES if named.get(name) is not None), None)


def filled_slots(named: Mapping[str, Any]) -> int:
    """How many slots of the cache are filled before the forward; 0 without a cache."""
    length = getattr(cache_of(named), "get_seq_length", None)
    return 0 if length is None else int(length())


@contextmanager
def images_in_the_forward(model: nn.Module) -> Iterator[None]:
    """Within the context, ``model.generate`` encodes images in its first forward, where hooks look for them."""
    if not hasattr(model, ENCODES_AHEAD):
        yield
        return
    setattr(model, ENCODES_AHEAD, lambda: False)
    try:
        yield
    finally:
        delattr(model, ENCODES_AHEAD)
