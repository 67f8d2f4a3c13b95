"""A tensor of which a process holds several pieces, as torch.distributed.checkpoint must see it.

A DTensor has one piece on each process. This one knows where each of its own lies in the whole, and is written and read
by the protocol that DTensors follow there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shared.sae.variants.clt_part import Cut


class Pieces(Tensor):
    """Stands for the whole, and has the memory of `local`, its pieces side by side."""

    local: Tensor
    cut: Cut
    pieces: list[Tensor]
    offsets: list[tuple[int, ...]]
    """Where each begins in the whole."""

    @staticmethod
    def __new__(cls, local: Tensor, cut: Cut) -> "Pieces":
        """`cut` says where the pieces lie."""
        made: Pieces = Tensor._make_wrapper_subclass(cls, cut.shape, dtype=local.dtype, device=local.device)
        made.local, made.cut = local, cut
        made.pieces = list(torch.split(local, [length for _, length in cut.spans], cut.axis))
        made.offsets = [tuple(first if axis == cut.axis else 0 for axis in range(local.ndim)) for first, _ in cut.spans]
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tensor in pieces")

    def __create_write_items__(self, fqn: str, _: Tensor) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=piece.size())
            for offset, piece in zip(self.offsets, self.pieces, strict=True)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.pieces[self.offsets.index(tuple(index.offset or ()))]
