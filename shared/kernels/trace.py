"""A program on tensors without memory: which of them are alive together, at any size, on any machine.

    with Trace(picks=64, lengths={262144: 26214}) as trace:
        trainer.step(batch)
    print(trace.peak.total, trace.flop)

The code that runs is training's own; torch's FakeTensorMode computes shapes and types in place of values. Where the
program asks for a value that it does not have, a stand-in is told: data are tame, and a row fires as many latents as
`picks` says. What a single operation uses inside is not seen.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from shared.kernels.storages import Block, Storages

# glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit machines: from here on a block is a mapping, which goes back when freed.
MMAP_THRESHOLD = 1 << 25
# Elements up to which counting (torch.arange) and what follows from it is done for real.
LONGEST_RANGE = 1 << 22
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
MAKERS = ("new_", "empty", "zeros", "ones", "full")
COMPARISONS = (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne)


@dataclass
class Peak:
    """The largest sums of bytes, of all blocks, of large and of small ones, which need not come at one moment."""

    total: int = 0
    large: int = 0
    small: int = 0
    moment: str = ""
    """``Trace.moment`` at the largest total."""
    blocks: Sequence[tuple[Block, int]] = ()
    """Alive at the largest total, with their bytes."""


class Trace(TorchDispatchMode):
    """Follows the storages of tensors made within the context."""

    def __init__(self, *, picks: int, lengths: Mapping[int, int], gloo: bool = True) -> None:
        """A mask has `picks` true entries in each row; one that is a vector has as many as `lengths` says for its
        length, else all. `gloo`: messages are its own."""
        super().__init__()
        self.picks, self.lengths, self.gloo = picks, lengths, gloo
        self.peak, self.storages = Peak(), Storages()
        self.moment = ""
        """What the program is at; its user sets it."""
        self.flop = 0
        """Of matrix products."""
        self._below = ExitStack()

    def __enter__(self) -> Self:
        self._below.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif str(func.overloadpacket) == "mkldnn._linear_pointwise":  # see shared.kernels.linear
            self.flop += 2 * args[0].numel() * args[1].shape[0]
        self._look(tree_leaves(result))
        return result

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet is aten.arange:
            if max(leaf for leaf in args if isinstance(leaf, int | float)) <= LONGEST_RANGE:
                return _compute(func, args, kwargs)
        elif given and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given):
            if not packet.__name__.startswith(MAKERS):
                return _compute(func, args, kwargs)
        elif packet in COMPARISONS and all(tensor.ndim == 0 for tensor in given):
            return _compute(func, tree_map(self._stand_in, args), kwargs)
        elif packet in (aten.any, aten.all) and func._overloadname == "default":
            return _compute(torch.tensor, (packet is aten.all,), {})
        elif packet is aten.sum and len(args) == 1 and given[0].dtype == torch.bool:
            return _compute(torch.tensor, (self._count_true(given[0]),), kwargs)
        elif packet is aten.nonzero:
            return self._places(given[0])
        elif packet in INDEXING:
            args = (args[0], [part for index in args[1] for part in self._as_places(index)], *args[2:])
        elif packet is torch.ops.c10d._reduce_scatter_base_ and self.gloo:
            self._look([torch.empty_like(given[1])])  # gloo sums in a copy
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return _compute(func, tree_map(self._stand_in, args), kwargs)

    def _stand_in(self, leaf: Any) -> Any:
        """A tensor with values: a number of picks, a place among latents (all are the first), a tame measurement."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        whole = self.picks if leaf.ndim == 0 else 0
        value = False if leaf.dtype == torch.bool else 1.0 if leaf.dtype.is_floating_point else whole
        return _compute(torch.full, (leaf.shape, value), {"dtype": leaf.dtype})

    def _count_true(self, mask: Tensor) -> int:
        if mask.ndim < 2:
            return self.lengths.get(mask.numel(), mask.numel())
        return mask.shape[:-1].numel() * min(mask.shape[-1], self.picks)

    def _places(self, mask: Tensor) -> Tensor:
        return torch.empty(self._count_true(mask), mask.ndim, dtype=torch.int64)

    def _as_places(self, index: Tensor | None) -> Sequence[Tensor | None]:
        """What an index by a mask makes of it first."""
        if index is None or index.dtype != torch.bool:
            return [index]
        places = self._places(index)
        self._look([places])
        return places.unbind(1)

    def _look(self, made: Sequence[Any]) -> None:
        """At all that is alive, where an operation has made more of it."""
        if not self.storages.follow(made):
            return
        blocks, peak = self.storages.alive(), self.peak
        large = sum(size for _, size in blocks if size >= MMAP_THRESHOLD)
        small = sum(size for _, size in blocks) - large
        peak.large, peak.small = max(peak.large, large), max(peak.small, small)
        if large + small > peak.total:
            peak.total, peak.moment, peak.blocks = large + small, self.moment, blocks


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Really, with values."""
    with _disable_current_modes():
        return func(*args, **kwargs)
