"""Which memory is alive: the storages of tensors that were made under watch, until the last view of them is gone."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(eq=False)
class Block:
    """A storage, not kept alive."""

    reference: StorageWeakRef
    name: str
    """Type and shape of the tensor that it was made for, until somebody knows better."""


class Storages:
    """Follows storages."""

    def __init__(self) -> None:
        self._seen: dict[int, Block] = {}

    def follow(self, made: Iterable[object]) -> bool:
        """Watch those of the tensors among `made`, a DTensor's is what it wraps; whether any was not seen before."""
        new = False
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen or self._seen[storage._cdata].reference.expired():
                    name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    self._seen[storage._cdata], new = Block(StorageWeakRef(storage), name), True
        return new

    def alive(self) -> list[tuple[Block, int]]:
        """Those that still exist, with their bytes: what was resized counts as it is now."""
        blocks = []
        for key, block in list(self._seen.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(block.reference.cdata)
            if storage is None:
                del self._seen[key]
            else:
                blocks.append((block, storage.nbytes()))
        return blocks

    def name(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Say what tensors that were seen are for."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()._cdata].name = name
