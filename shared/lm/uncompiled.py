"""Hooks and torch.compile: compiled code does not look for hooks that were added or removed since it was compiled."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from shared.basics.errors import GranaryError


class _Eager:
    """How many want uncompiled code now: the first begins it and the last ends it, in whichever order they leave."""

    def __init__(self) -> None:
        self.users = 0
        self.stance: AbstractContextManager[Any] = nullcontext()

    @contextmanager
    def wanted(self) -> Iterator[None]:
        if not self.users:
            self.stance = torch.compiler.set_stance("force_eager")
            self.stance.__enter__()
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self.stance.__exit__(None, None, None)


_EAGER = _Eager()


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which code compiled by torch.compile runs as it was written, so that hooks of `model` are called.

    flex_attention is compiled by itself, needs that, and holds no hooks; with it, raises GranaryError for a model that
    was compiled beside.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "flex_attention":
        return _EAGER.wanted()
    modules = [model, *model.modules()]
    if any(module._compiled_call_impl is not None or "forward" in vars(module) for module in modules):
        raise GranaryError("the model is compiled: splice one that is not, or load it with another attn_implementation")
    return nullcontext()
