"""Gradient checkpointing: a layer that runs again, in the backward pass, belongs to one of the forwards before it.

Hooks on its modules are then to do what they did in that forward, whichever forward was the last. transformers runs a
checkpointed layer by a function that each module holds; within `remembering` each call of that function takes along
what the hooks go by.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.places import trunk

# Where a module of transformers keeps the function that runs it now and again in the backward pass.
FUNCTION = "_gradient_checkpointing_func"

# The method of a model that switches it on; older versions of transformers have another name alone.
SWITCH = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)

Again = Callable[[], AbstractContextManager[None]]
# Per trunk: what is to be taken along, asked for at each call of a checkpointed function.
_TAKERS: WeakKeyDictionary[nn.Module, list[Callable[[], Again]]] = WeakKeyDictionary()


def is_checkpointed(model: nn.Module) -> bool:
    """Whether a layer of the model, one of transformers, is run again in a backward pass of training."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def remembering(model: nn.Module, owner: object, name: str) -> Iterator[None]:
    """Within the context, a layer that is run again finds attribute `name` of `owner` as it was in the layer's forward.

    A layer of such a forward that is run again after the context raises GranaryError: the hooks are gone by then.
    """
    body, is_over = trunk(model), False
    weak = weakref.ref(owner)  # what is kept per trunk must not keep it: an owner may hold its model

    def take() -> Again:
        owner = weak()
        if owner is None:
            return nullcontext
        kept = getattr(owner, name)

        @contextmanager
        def again() -> Iterator[None]:
            if is_over:
                raise GranaryError(
                    "gradient checkpointing runs layers again in the backward pass, when the splice of their forward "
                    "is gone: put the forward and the backward pass into one `with`"
                )
            before = getattr(owner, name)
            setattr(owner, name, kept)
            try:
                yield
            finally:
                setattr(owner, name, before)

        return again

    takers = _TAKERS.setdefault(body, [])
    takers.append(take)
    handle = body.register_forward_pre_hook(_install)
    try:
        yield
    finally:
        is_over = True
        handle.remove()
        takers.remove(take)
        if not takers:
            for module in body.modules():
                function = getattr(module, FUNCTION, None)
                if isinstance(function, _TakingAlong):
                    setattr(module, FUNCTION, function.original)


class _TakingAlong:
    """A checkpointing function that runs what it is given with what is to be remembered in place, each time."""

    def __init__(self, original: Callable[..., Any], takers: list[Callable[[], Again]]) -> None:
        self.original, self.takers = original, takers

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        taken = [take() for take in self.takers]

        def run(*inputs: Any, **named: Any) -> Any:
            with ExitStack() as stack:
                for again in taken:
                    stack.enter_context(again())
                return function(*inputs, **named)

        return self.original(run, *args, **kwargs)


def _install(body: nn.Module, _args: Any) -> None:
    """Before each forward, since checkpointing may be switched on at any time."""
    if not torch.is_grad_enabled():
        return
    for module in body.modules():
        function = getattr(module, FUNCTION, None)
        if function is not None and not isinstance(function, _TakingAlong):
            setattr(module, FUNCTION, _TakingAlong(function, _TAKERS[body]))
