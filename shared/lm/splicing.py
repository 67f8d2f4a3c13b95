"""Replacing activations of a decoder: at one site, or from what some sites hold to what others are given.

A splice that does not run is worse than an error: the logits are those of the clean model, and whoever steers or
evaluates takes them for the result. So after each forward of the trunk it is checked that every site ran exactly once,
and code that was compiled before the hooks were placed, which would pass them by, runs uncompiled within the context.

Shapes: B rows, T positions, d_in and d_out the widths of the read and of the written sites, side by side.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.lm.calls import filled_slots, named_arguments
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.modulepoint import ModulePoint, Point
from shared.lm.places import body_of, decoder_blocks, locate
from shared.lm.recomputation import SWITCH, remembering
from shared.lm.uncompiled import uncompiled

Where = Callable[[Tensor], Tensor | None]
"""From an activation [..., d] to which of its positions are meant, bool [...]; None: all."""

# Most relative difference of an activation that is computed a second time from the same tokens.
RECOMPUTED = 0.05


@contextmanager
def splice(model: nn.Module, hook: Point, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, each forward of `model` continues from ``fn(activation)`` instead of the activation.

    `fn` gets [B, T, d_model] in the model's dtype; its result is cast back to that dtype and must have that shape.
    Raises GranaryError after a forward in which the site did not run exactly once.
    """
    with splice_through(model, [hook], [hook], fn):
        yield


@contextmanager
def splice_through(
    model: nn.Module,
    reads: Sequence[Point],
    writes: Sequence[Point],
    fn: Callable[[Tensor], Tensor],
    *,
    where: Tensor | Where | None = None,
    widths: Sequence[int] | None = None,
    adds: bool = False,
    read_widths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within the context, each forward of `model` goes on, at the sites `writes`, from what `fn` makes of `reads`.

    `fn` gets the activations of the read sites side by side, [B, T, d_in], in the model's dtype, once per forward; its
    result [B, T, d_out] is cut among the written sites and cast back. `where`, bool [B, T], says which positions are
    replaced; None: all; or it is asked, with the activation that may be replaced, in each forward. With `adds` the
    result is added to what is there. `widths` are those of the written sites; None: all are equally wide. `read_widths`
    are those of the read sites, for an `fn` whose result at a site does not depend on what is computed later: it is
    then called at every written site, with zeros for the reads that are not there yet.

    A forward raises GranaryError where a site is read that is computed after one that is written, and where a site did
    not run exactly once; ValueError for a result of another shape.
    """
    state = _Splice(reads, writes, fn, where, widths, read_widths, adds=adds)
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        stack.enter_context(remembering(model, state, "seen"))
        for hook in dict.fromkeys((*reads, *writes)):
            see: Callable[[Tensor], Tensor | None] = partial(state.see, hook)
            if hook in writes and isinstance(hook, HookPoint) and hook.site == "resid_mid":
                see = _carried(model, hook, partial(state.replace, hook), stack)
            stack.callback(hook_at(locate(model, hook), see).remove)
        body = body_of(model, (*reads, *writes))
        stack.callback(body.register_forward_pre_hook(state.begin, with_kwargs=True, prepend=True).remove)
        stack.callback(body.register_forward_hook(state.end).remove)
        yield


@dataclass(slots=True)
class _Seen:
    """What one splice has seen of one forward."""

    captured: dict[Point, Tensor] = field(default_factory=dict)
    result: Tensor | None = None
    computed_at: Point | None = None
    ran: Counter[Point] = field(default_factory=Counter)
    has_grad: bool = field(default_factory=torch.is_grad_enabled)


class _Splice:
    """One splice, and what it has seen of the forward that runs, or is run again."""

    def __init__(
        self,
        reads: Sequence[Point],
        writes: Sequence[Point],
        fn: Callable[[Tensor], Tensor],
        where: Tensor | Where | None,
        widths: Sequence[int] | None,
        read_widths: Sequence[int] | None,
        *,
        adds: bool,
    ) -> None:
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.fn, self.where, self.widths, self.read_widths, self.adds = fn, where, widths, read_widths, adds
        self.seen = _Seen()
        self.is_inside = self.continues = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the trunk: nothing has been seen yet."""
        self.seen = _Seen()
        self.is_inside = True
        self.continues = filled_slots(named_arguments(module, args, kwargs)) > 0

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """After a forward of the trunk: raise GranaryError unless every site ran exactly once."""
        self.is_inside = False
        ran = self.seen.ran
        if not torch.is_grad_enabled():  # else a checkpointed layer may run again, in the backward pass
            self.seen = _Seen()
        for hook in dict.fromkeys((*self.reads, *self.writes)):
            if ran[hook] == 0 and self.continues and isinstance(hook, ModulePoint):
                continue  # the images of a sequence go through their tower once, in its first forward
            if ran[hook] != 1:
                times = "did not run" if ran[hook] == 0 else f"ran {ran[hook]} times"
                raise GranaryError(
                    f"the splice at {hook} {times} in a forward of the model, so its output means nothing: the model"
                    " passes the module by (a fused or compiled replacement?); load it without"
                )

    def see(self, hook: Point, activation: Tensor) -> Tensor | None:
        """Keep the activation of a read site; return what takes the place of a written one's."""
        if hook in self.writes:
            return self.replace(hook, activation)
        self._keep(hook, activation)
        return None

    def replace(self, hook: Point, activation: Tensor) -> Tensor:
        """What the model goes on from at a written site."""
        self._keep(hook, activation)
        seen = self.seen
        # A checkpointed layer that runs again, in the backward pass, computes what it computed in the forward.
        if seen.result is None or (not self.is_inside and hook == seen.computed_at):
            seen.result, seen.computed_at = self.fn(self._side_by_side(hook)), hook
        part = seen.result if len(self.writes) == 1 else self._cut(seen.result, hook)
        if part.shape != activation.shape:  # a shape that broadcasts would go on unnoticed
            raise ValueError(f"splice at {hook}: {tuple(part.shape)} in place of {tuple(activation.shape)}")
        part = (activation + part if self.adds else part).to(activation.dtype)
        if self.where is None:
            return part
        where = self.where if isinstance(self.where, Tensor) else self.where(activation)
        return part if where is None else torch.where(where[..., None], part, activation)

    def _keep(self, hook: Point, activation: Tensor) -> None:
        seen = self.seen
        seen.ran[hook] += self.is_inside
        if self.is_inside and seen.has_grad and not torch.is_grad_enabled() and self._spans_layers:
            raise GranaryError(
                "reentrant gradient checkpointing cuts the gradient between the layers that this dictionary reads and"
                f" writes: model.{SWITCH}({{'use_reentrant': False}})"
            )
        if hook in self.reads:
            if not self.is_inside:
                _check_same(seen.captured.get(hook), activation, hook)
            seen.captured[hook] = activation
            seen.result = None

    def _side_by_side(self, written: Point) -> Tensor:
        """The activations of the read sites, [B, T, d_in]; of one site its own tensor."""
        captured = self.seen.captured
        missing = [hook for hook in self.reads if hook not in captured]
        if missing and self.read_widths is not None and captured:
            seen = next(iter(captured.values()))
            parts = [
                captured[hook] if hook in captured else seen.new_zeros(*seen.shape[:-1], width)
                for hook, width in zip(self.reads, self.read_widths, strict=True)
            ]
            return torch.cat(parts, dim=-1)
        if missing:
            raise GranaryError(
                f"{missing[0]} is computed after {written}: what is written there can't depend on it within one forward"
            )
        if len(self.reads) == 1:
            return captured[self.reads[0]]
        return torch.cat([captured[hook] for hook in self.reads], dim=-1)

    @property
    def _spans_layers(self) -> bool:
        layers = {None if isinstance(hook, ModulePoint) else hook.layer for hook in (*self.reads, *self.writes)}
        return len(layers) > 1

    def _cut(self, result: Tensor, hook: Point) -> Tensor:
        """The columns of `result` that are for `hook`."""
        widths = self.widths or [result.shape[-1] // len(self.writes)] * len(self.writes)
        if sum(widths) != result.shape[-1]:
            raise ValueError(f"splice: {result.shape[-1]} columns for written sites of {', '.join(map(str, widths))}")
        parts = torch.split(result, list(widths), dim=-1)
        return parts[self.writes.index(hook)]


def _check_same(before: Tensor | None, again: Tensor, hook: Point) -> None:
    """Raise GranaryError unless a layer that runs again does so in the forward whose activation `before` is."""
    if before is not None and before.shape == again.shape:
        far, size = (again.detach() - before.detach()).float().norm(), before.detach().float().norm()
        if not far > RECOMPUTED * size:  # NaN is no difference
            return
    raise GranaryError(
        f"the layer of {hook} runs outside a forward of the model, on other tokens than those of the last one: a"
        " backward pass that runs layers again must follow its own forward, unless they are checkpointed by"
        f" model.{SWITCH}()"
    )


def _carried(
    model: nn.Module, hook: HookPoint, replace: Callable[[Tensor], Tensor], stack: ExitStack
) -> Callable[[Tensor], Tensor]:
    """`replace` for ``resid_mid``, whose module reads the stream and does not pass it on.

    What replaces the stream is kept, and the layer's output becomes its sum with what the MLP adds, as the layer itself
    computes it. The hooks that see to that end with `stack`.
    """
    kept: dict[str, Tensor] = {}

    def keep_middle(activation: Tensor) -> Tensor:
        kept["middle"] = replace(activation)
        return kept["middle"]

    def keep_branch(branch: Tensor) -> None:
        kept["branch"] = branch

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        total = kept.pop("middle") + kept.pop("branch")
        return (total, *output[1:]) if isinstance(output, tuple) else total

    stack.callback(hook_at(locate(model, HookPoint(hook.layer, "mlp_out")), keep_branch).remove)
    # Before all other hooks on the layer's output: they are to see what goes on to the next layer.
    block = decoder_blocks(model)[hook.layer]
    stack.callback(block.register_forward_hook(add, prepend=True).remove)
    return keep_middle
