"""The forward over contexts with images: each alone, with the pixels of its images from the store."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.images import EncodedImage
from shared.lm.modulepoint import Point
from shared.lm.vision.reader import VisionReader
from shared.store import Store
from stage_harvest.config import PackingMode
from stage_harvest.shards.forward import ShardForward


class PicturedForward(ShardForward):
    """Runs the trunk, vision tower included, over one row at a time."""

    def __init__(
        self, trunk: PreTrainedModel, hooks: Sequence[Point], store: Store, vision: VisionReader, device: torch.device
    ) -> None:
        super().__init__(trunk, hooks, packing=PackingMode.separate, batch_contexts=1, device=device)
        self.pictures, self.vision = store.pictures, vision

    def inputs(self, tokens_BT: Tensor, segments_BT: Tensor, first_context: int) -> dict[str, Any]:
        """Keyword arguments of the forward for the one context, its images those of the table, in order."""
        hashes = {row.number: row.sha256 for row in self.pictures.rows_of(first_context)}
        where = f"context {first_context} of {self.pictures.url}, image"
        images = [EncodedImage(self.pictures.data(one), f"{where} {n}").decode() for n, one in sorted(hashes.items())]
        given = self.vision.inputs(tokens_BT[0].cpu(), images)
        return {name: one.to(self.device) if isinstance(one, Tensor) else one for name, one in given.items()}
