"""A program on tensors without memory: which of them are alive together, at any size, on any machine.

    with Trace(picks=64, lengths={262144: 26214}) as trace:
        trainer.step(batch)
    print(trace.most.total)

The code that runs is training's own; torch's FakeTensorMode computes shapes and types in place of values. Where the
program asks for a value that it does not have, a stand-in is told: data are tame, and a row fires as many latents as
`picks` says. What a single operation uses inside is not seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

# glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit machines: from here on a block is a mapping, which goes back when freed.
MMAP_THRESHOLD = 1 << 25
# Elements up to which counting (torch.arange) and what follows from it is done for real.
LONGEST_RANGE = 1 << 22
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
MAKERS = ("new_", "empty", "zeros", "ones", "full")
COMPARISONS = (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne)


@dataclass
class Most:
    """The largest sums of bytes since ``Trace.begin``; large and small blocks need not peak at one moment."""

    total: int = 0
    large: int = 0
    small: int = 0
    alive: dict[int, tuple[int, str]] = field(default_factory=dict)
    """At the moment of the largest total: bytes, and type and shape, by the storage's number; see ``Trace.number``."""


class Storage(NamedTuple):
    """Memory of a tensor and its views."""

    reference: StorageWeakRef
    number: int
    size: int
    label: str
    """Type and shape of the tensor that it was made for."""


class Trace(TorchDispatchMode):
    """Counts the storages that are alive, those of tensors made within the context."""

    def __init__(self, *, picks: int, lengths: Mapping[int, int], gloo: bool = True) -> None:
        """A mask has `picks` true entries in each row; one that is a vector has as many as `lengths` says for its
        length, else all. `gloo`: messages are its own."""
        super().__init__()
        self.picks, self.lengths, self.gloo = picks, lengths, gloo
        self.most = Most()
        self._alive: dict[int, Storage] = {}
        self._made = 0
        self._below = ExitStack()

    def __enter__(self) -> Self:
        self._below.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        resize, alive = torch.UntypedStorage.resize_, self._alive

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            if (known := alive.get(storage._cdata)) is not None:
                alive[storage._cdata] = Storage(known.reference, known.number, size, known.label)
            resized: torch.UntypedStorage = resize(storage, size)
            return resized

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self._below.callback(setattr, torch.UntypedStorage, "resize_", resize)
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.close()

    def begin(self) -> Most:
        """Begin to look anew; returns what was seen until then."""
        seen, self.most = self.most, Most()
        self._follow([])
        return seen

    def number(self, tensor: Tensor) -> int:
        """Of the storage of a tensor that was made within the context."""
        return self._alive[tensor.untyped_storage()._cdata].number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        self._follow(tree_leaves(result))
        return result

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet is aten.arange:
            if max(_numbers(args)) <= LONGEST_RANGE:
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
        elif packet is aten.bincount:  # all in the first
            return _compute(torch.tensor, ([given[0].numel()] + [0] * (kwargs.get("minlength", args[-1]) - 1),), {})
        elif packet is aten.unique_consecutive:  # one run
            counts = _compute(torch.tensor, ([given[0].numel()],), {})
            return torch.empty(1, dtype=given[0].dtype), torch.empty(0, dtype=torch.int64), counts
        elif packet is aten._local_scalar_dense:
            return self._value(given[0].dtype)
        elif packet is aten.nonzero:
            return self._places(given[0])
        elif packet in INDEXING:
            args = (args[0], [part for index in args[1] for part in self._as_places(index)], *args[2:])
        elif packet is torch.ops.c10d._reduce_scatter_base_ and self.gloo:
            self._follow([torch.empty_like(given[1])])  # gloo sums in a copy
        return func(*args, **kwargs)

    def _stand_in(self, leaf: Any) -> Any:
        """A scalar tensor with a value."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        return _compute(torch.tensor, (self._value(leaf.dtype),), {"dtype": leaf.dtype})

    def _value(self, dtype: torch.dtype) -> float:
        return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else self.picks

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
        self._follow([places])
        return places.unbind(1)

    def _follow(self, made: Iterable[Any]) -> None:
        for key in [key for key, storage in self._alive.items() if storage.reference.expired()]:
            del self._alive[key]
        for tensor in made:
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):  # a DTensor's is what it wraps
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    label = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    self._made += 1
                    self._alive[storage._cdata] = Storage(StorageWeakRef(storage), self._made, storage.nbytes(), label)
        sizes = [storage.size for storage in self._alive.values()]
        large = sum(size for size in sizes if size >= MMAP_THRESHOLD)
        small, most = sum(sizes) - large, self.most
        most.large, most.small = max(most.large, large), max(most.small, small)
        if large + small > most.total:
            most.total, most.alive = large + small, {one.number: (one.size, one.label) for one in self._alive.values()}


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Really, with values."""
    with _disable_current_modes():
        return func(*args, **kwargs)


def _numbers(args: Sequence[Any]) -> list[int | float]:
    return [leaf for leaf in args if isinstance(leaf, int | float)]
