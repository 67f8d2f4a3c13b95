"""What a forward of a model is called with."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from torch import nn


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a forward, each under the name of its parameter, however it is given."""
    if not args:
        return kwargs
    inside = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, one in signature(module.forward).parameters.items() if one.kind in inside]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def filled_slots(named: Mapping[str, Any]) -> int:
    """How many slots of the cache are filled before the forward; 0 without a cache."""
    length = getattr(named.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())
