"""What runs ask of activations that come from a shuffle buffer: figures and a sample of its first filling.

Shape letters: N rows, D features, M rows of the sample.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.sites import Sites
from shared.store import HookStatistics
from shared.store.statistics import BLOCK_ROWS, RowStatistics
from stage_train.data.inputs import SAMPLE_TOKENS
from stage_train.data.stream.permutation import Purpose, random_order


class BufferedInputs:
    """What a run asks of the activations, answered from the rows that are in the buffers when it is made."""

    def __init__(self, rows: Mapping[str, Tensor], model: Mapping[str, Any]) -> None:
        """`rows` [N, D] of each place; `model` is the record of what computed them."""
        self.rows, self.model = rows, model

    def statistics(self, site: str) -> HookStatistics:
        """Return those of the first filling. Raises GranaryError where an activation is not finite."""
        found = RowStatistics.empty(self.rows[site].shape[1])
        for block_ND in torch.split(self.rows[site], BLOCK_ROWS):
            block = [block_ND.float().cpu().numpy().copy()]
            squared_norms = found.add_block(block, np.ones(len(block_ND), np.bool_))
            if squared_norms is None:
                raise GranaryError(f"an activation at {site} is not finite: run the model in float32 or bfloat16")
            found.norms.add(squared_norms)
        return HookStatistics.from_rows(found)

    def sample(self, sites: Sites, seed: int) -> tuple[Tensor, Tensor]:
        """A few thousand rows of an SAE's place, float32 [M, D]; both are the same tensor."""
        (name,) = sites.names
        order = random_order(len(self.rows[name]), Purpose.SAMPLE, seed, 0)[:SAMPLE_TOKENS]
        x_MD = self.rows[name][torch.from_numpy(order).to(self.rows[name].device)].float().cpu()
        return x_MD, x_MD

    def records(self) -> list[dict[str, Any]]:
        """There is no store."""
        return []

    def origin(self) -> dict[str, Any]:
        """The model alone: no context has a length, and there is no store."""
        return {"model": dict(self.model), "seq_len": None, "stores": []}
