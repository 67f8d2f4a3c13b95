"""Copies of a training state in host memory, from which a checkpoint is written while training goes on.

From a GPU into memory that is new each time, a copy runs at the rate at which the system hands out pages: 10 s and more
for the 26 GB of 262,144 latents of width 4,096, in which training stands still. So a GPU's copies stay, page-locked,
from one checkpoint to the next, and the device writes into them by itself.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stage_train.state.pieces import Pieces


class HostCopies:
    """Room on the host for a training state that lies on a GPU; a state on the host is copied into new memory."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors`, complete on return, with the placement of those that are a rank's part of a whole.

        Those of a GPU's tensors are written anew by the next call: what reads them must be done by then.
        """
        own = {name: local(tensor) for name, tensor in tensors.items()}
        copies = {name: self._begin(name, tensor) for name, tensor in own.items()}
        if any(tensor.is_cuda for tensor in own.values()):
            torch.cuda.synchronize()
        return {name: placed_as(tensor, copies[name]) for name, tensor in tensors.items()}

    def _begin(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        room = self._kept.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = self._kept[name] = page_locked(tensor.shape, tensor.dtype)
        return room.copy_(tensor, non_blocking=True)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor this rank holds, without its history."""
    if isinstance(tensor, Pieces):
        return tensor.local.detach()
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, part: Tensor) -> Tensor:
    """`part` in the place that a rank's part of `tensor` has: the planner of a save reads it."""
    if isinstance(tensor, Pieces):
        return Pieces(part, tensor.cut)
    if not isinstance(tensor, DTensor):
        return part
    placed: Any = tensor.detach()  # a new object
    placed._local_tensor = part
    same: Tensor = placed
    return same


def page_locked(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that a GPU can write into by itself; locked where it lies, since torch's own pool rounds sizes up."""
    room = torch.empty(shape, dtype=dtype)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = room.data_ptr(), room.nbytes
    if size and int(runtime.cudaHostRegister(address, size, 0)) == 0:  # without it, copies are slower and as right
        weakref.finalize(room, runtime.cudaHostUnregister, address)
    return room
