"""Forwards of a decoder that begin in the middle: with what its first layers made of the same tokens before.

Passes that differ from one another by what is replaced at layer L compute all before L alike, so it is kept from the
first of them. transformers hands the stream from layer to layer as a value; where a model shares more than that (keys
and values of an earlier layer, say), a forward that begins in the middle is another one, or fails: ask `is_exact`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared.lm.modulepoint import ModulePoint, Point
from shared.lm.places import decoder_blocks

Kept = dict[int, Any]
"""By how many layers have run: the output of the last of them."""

# What a forward without its first layers may fail with, by what it misses.
MISSED = (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError)


def layers_before(points: Iterable[Point]) -> int:
    """How many of the first layers can't be told apart by what is read or replaced at `points`; 0 for none of them."""
    return min((_layers_before(point) for point in points), default=0)


def _layers_before(point: Point) -> int:
    if isinstance(point, ModulePoint):
        return 0
    return point.layer + (point.site == "resid_post")


@contextmanager
def keeping(model: nn.Module, depths: Collection[int], kept: Kept) -> Iterator[None]:
    """Within the context each forward puts into `kept` what the first layers made, 1 or more of them, as
    many as each of `depths` says; no copies."""
    blocks = decoder_blocks(model)
    with ExitStack() as stack:
        for depth in depths:

            def keep(_module: nn.Module, _args: Any, output: Any, depth: int = depth) -> None:
                kept[depth] = output

            stack.callback(blocks[depth - 1].register_forward_hook(keep).remove)
        yield


@contextmanager
def replaying(model: nn.Module, depth: int, output: Any) -> Iterator[None]:
    """Within the context the first `depth` layers are not computed: `output` is what they make."""
    with ExitStack() as stack:
        for block in decoder_blocks(model)[:depth]:
            stack.callback(_restore, block, vars(block).get("forward"))
            block.forward = lambda *_, **__: output
        yield


def _restore(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Undo what `replaying` did to a layer, of which somebody else may have replaced the forward before."""
    del block.forward
    if forward is not None:
        block.forward = forward


def is_exact(run: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a forward that begins in the middle ends as a whole one did, bit for bit."""
    try:
        return torch.equal(run(), expected)
    except MISSED:
        return False
