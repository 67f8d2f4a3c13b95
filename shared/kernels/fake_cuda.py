"""A step on a GPU, followed without one: tensors that hold no data, and a record of what is done to them.

    with FakeCuda() as record:
        step(torch.zeros(8192, 4096, device=DEVICE))
    print(record.launches, record.syncs, record.peak_bytes)

The tensors are on torch's device ``meta`` and claim to be on a GPU. What needs a value on the host (``int(tensor)``,
``nonzero``) raises, as there is none; what copies a host's value to the device is recorded in ``syncs``. So a step that
comes through with no syncs never waits for the device. Kernels are not run: a launch is recorded, with the tensors it
was given. Not under TRITON_INTERPRET.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.kernels.trace import Storages

DEVICE = "meta"
# What waits where a tensor of the host is among its arguments.
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


@dataclass
class Launch:
    """One launch of a Triton kernel."""

    kernel: str
    grid: tuple[int, ...]
    tensors: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]
    """Shape, type, and whether contiguous, of each."""


class FakeCuda(TorchDispatchMode):
    """Records launches, other operations with the bytes they read and write, syncs, and the most memory alive."""

    def __init__(self, device: str = DEVICE) -> None:
        """`device`: where tensors really lie that claim to be on a GPU; ``cpu`` with torch's FakeTensorMode below."""
        super().__init__()
        self.device = device
        self.launches: list[Launch] = []
        self.operations: list[tuple[str, int]] = []
        """Names and bytes of what runs beside the kernels; views are left out."""
        self.syncs: list[str] = []
        self._storages = Storages()
        self._run: Callable[..., Any] | None = None

    def __enter__(self) -> Self:
        from triton.runtime.jit import JITFunction

        self._run, record = JITFunction.run, self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **_: Any) -> None:
            tensors = (argument for argument in args if isinstance(argument, torch.Tensor))
            described = tuple((tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) for tensor in tensors)
            record.launches.append(Launch(kernel.fn.__name__, tuple(grid), described))

        JITFunction.run = run
        tensors: Any = torch.Tensor
        set_item = tensors.__setitem__

        def assign(tensor: torch.Tensor, index: Any, value: Any) -> None:
            if isinstance(index, torch.Tensor) and not isinstance(value, torch.Tensor):
                record.syncs.append("a Python value assigned at a tensor's indices")  # makes a tensor on the host
            set_item(tensor, index, value)

        tensors.__setitem__ = assign
        tensors.is_cuda = property(lambda tensor: tensor.device.type == record.device)
        self._capability = torch.cuda.get_device_capability
        torch.cuda.get_device_capability = lambda device=None: (9, 0)  # asked for by messages between processes
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        from triton.runtime.jit import JITFunction

        super().__exit__(*error)
        tensors: Any = torch.Tensor
        del tensors.is_cuda, tensors.__setitem__  # those of the parent class are there again
        JITFunction.run = self._run
        torch.cuda.get_device_capability = self._capability

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = (
            bool(made) and all(t.untyped_storage()._cdata in storages for t in made) and not func._schema.is_mutable
        )
        if not is_view:
            size = sum(t.numel() * t.element_size() for t in (*given, *made) if t.device.type == self.device)
            self.operations.append((str(func), size))
        from_host = [t for t in given if t.device.type == "cpu"]
        if from_host and func.overloadpacket in COPIES and any(t.device.type == self.device for t in (*given, *made)):
            self.syncs.append(f"{func} of {tuple(from_host[0].shape)} from the host")
        self._storages.follow(tensor for tensor in made if tensor.device.type == self.device)
        return result

    def forget(self) -> None:
        """Forget what was recorded, but not which tensors exist."""
        self.launches.clear()
        self.operations.clear()
        self.syncs.clear()
        self._storages.peak = 0

    @property
    def peak_bytes(self) -> int:
        """The most memory of tensors that existed together."""
        return self._storages.peak

    @property
    def alive_bytes(self) -> int:
        """Memory of the tensors that exist at this moment."""
        return sum(size for _, size in self._storages.alive())
