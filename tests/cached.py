"""The cache of keys and values, under the name that the installed transformers has for it."""

from inspect import signature
from typing import Any

from torch import nn
from transformers import LlamaModel

from shared.lm.calls import CACHES
from shared.lm.recomputation import SWITCH

NAME = next(name for name in CACHES if name in signature(LlamaModel.forward).parameters)


def continuing(cache: Any) -> dict[str, Any]:
    """The argument that continues `cache`."""
    return {NAME: cache}


def cache_in(output: Any) -> Any:
    """That of what a forward, or ``generate``, gave back."""
    return getattr(output, NAME)


def checkpoint_layers(model: nn.Module, *, reentrant: bool) -> None:
    """Switch gradient checkpointing on."""
    getattr(model, SWITCH)({"use_reentrant": reentrant})
