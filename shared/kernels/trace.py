"""A program on tensors without memory: which of them are alive together, at any size, on any machine.

    with FakeTensorMode(allow_non_fake_inputs=True), Trace(picks=64, lengths={262144: 26214}) as trace:
        trainer.step(batch)
    print(trace.storages.peak, trace.flop)

The code that runs is training's own; torch's FakeTensorMode computes shapes and types in place of values. Where the
program asks for a value that nobody has, it is told that data are tame: a row fires as many latents as `picks` says,
and all latents fire alike. What a single operation uses inside is not seen.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from shared.kernels.pairs import PairOrder

# glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit machines: from here on a block is a mapping, which goes back when freed.
MMAP_THRESHOLD = 1 << 25
# Elements up to which counting (torch.arange) is done for real.
LONGEST_RANGE = 1 << 22
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
MAKERS = ("new_", "empty", "zeros", "ones", "full")
COMPARISONS = (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne)


@dataclass(eq=False)
class Block:
    """A storage: type and shape of the tensor that it was made for, until somebody knows what it is for."""

    name: str


class Storages:
    """Which memory is alive: the storages of tensors made under watch, until the last view of them is gone."""

    def __init__(self) -> None:
        self._blocks = WeakIdKeyDictionary()
        self.peak, self.large, self.small = 0, 0, 0
        """The largest sums of bytes, of all blocks, of large and of small ones, which need not come at one moment."""
        self.at_peak: Sequence[tuple[Block, int]] = ()
        self.moment = self.peak_moment = ""
        """What the program is at, which its user sets, and was at when memory was fullest."""

    def alive(self) -> list[tuple[Block, int]]:
        """Those that exist, with their bytes: what was resized counts as it is now."""
        return [(block, storage.nbytes()) for storage, block in self._blocks.items()]

    def follow(self, made: Iterable[object]) -> None:
        """Watch the tensors among `made`, of a DTensor what it wraps."""
        is_new = False
        for tensor in made:
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                storage = tensor.untyped_storage()
                if storage not in self._blocks:
                    is_new = True
                    self._blocks[storage] = Block(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        if not is_new:
            return
        blocks = self.alive()
        total, large = (sum(size for _, size in blocks if size >= least) for least in (0, MMAP_THRESHOLD))
        self.large, self.small = max(self.large, large), max(self.small, total - large)
        if total > self.peak:
            self.peak, self.at_peak, self.peak_moment = total, blocks, self.moment

    def by_name(self) -> Counter[str]:
        """Bytes at the peak."""
        found = Counter[str]()
        for block, size in self.at_peak:
            found[block.name] += size
        return found

    def name(self, tensors: Iterable[Tensor], name: str) -> None:
        """Say what tensors that were seen are for."""
        for tensor in tensors:
            self._blocks[tensor.untyped_storage()].name = name


class Trace(TorchDispatchMode):
    """Follows what is made within the context."""

    def __init__(self, *, picks: int, lengths: Mapping[int, int]) -> None:
        """A mask has `picks` true entries in each row; a vector as many as `lengths` says for its length, else all."""
        super().__init__()
        self.picks, self.lengths, self.storages = picks, lengths, Storages()
        self.flop = 0
        """Of matrix products."""

    def __enter__(self) -> Self:
        self._tame = patch.object(PairOrder, "starts", _all_alike)
        self._tame.start()
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        self._tame.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif str(func.overloadpacket) == "mkldnn._linear_pointwise":  # see shared.kernels.linear
            self.flop += 2 * args[0].numel() * args[1].shape[0]
        self.storages.follow(tree_leaves(result))
        return result

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        packet, given = func.overloadpacket, [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        has_values = given and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)
        counts = packet is aten.arange and max(args) <= LONGEST_RANGE
        if counts or (has_values and not packet.__name__.startswith(MAKERS)):
            return _compute(func, args, kwargs)
        if packet in COMPARISONS and all(tensor.ndim == 0 for tensor in given):
            return _compute(func, tree_map(self._stand_in, args), kwargs)
        if packet is aten.all and len(args) == 1:
            return _compute(torch.tensor, (True,), {})
        if packet is aten.sum and len(args) == 1 and given[0].dtype == torch.bool:
            return _compute(torch.tensor, (self._count_true(given[0]),), kwargs)
        if packet is aten.nonzero:
            return self._places(given[0])
        if packet in INDEXING:
            args = (args[0], [part for index in args[1] for part in self._as_places(index)], *args[2:])
        if packet is torch.ops.c10d._reduce_scatter_base_ and not given[1].is_cuda:
            self.storages.follow([torch.empty_like(given[1])])  # gloo sums in a copy
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return _compute(func, tree_map(self._stand_in, args), kwargs)

    def _stand_in(self, leaf: Any) -> Any:
        """A tensor with values: a number of picks, a place among latents (all are the first), a tame measurement."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        value = (
            1.0 if leaf.dtype.is_floating_point else self.picks if leaf.ndim == 0 and leaf.dtype != torch.bool else 0
        )
        return _compute(torch.full, (leaf.shape, value), {"dtype": leaf.dtype})

    def _count_true(self, mask: Tensor) -> int:
        if mask.ndim < 2:
            return self.lengths.get(mask.numel(), mask.numel())
        return mask.shape[:-1].numel() * min(mask.shape[-1], self.picks)

    def _places(self, mask: Tensor) -> Tensor:
        places = torch.empty(self._count_true(mask), mask.ndim, dtype=torch.int64)
        self.storages.follow([places])
        return places

    def _as_places(self, index: Tensor | None) -> Sequence[Tensor | None]:
        """What an index by a mask makes of it first."""
        return [index] if index is None or index.dtype != torch.bool else self._places(index).unbind(1)


def _all_alike(order: PairOrder) -> list[int]:
    """Where the pairs of each latent begin."""
    return [order.indices_NK.numel() * number // order.num_latents for number in range(order.num_latents + 1)]


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Really, with values."""
    with _disable_current_modes():
        return func(*args, **kwargs)
