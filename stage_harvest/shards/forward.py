"""The forward pass over one shard of contexts, into staging memory.

Shapes: B contexts per forward, T positions, D = d_model.

The grouping of contexts into forwards decides the last bits of float sums. It is therefore fixed: forwards take
`batch_contexts` consecutive contexts of one shard, counted from the shard's first, and that number is part of the
store's identity. So a shard is a pure function of the model and its own tokens, whoever makes it and however often.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.lm import capture, packed_inputs
from shared.lm.modulepoint import Point, site_of
from shared.lm.packed import document_length
from stage_harvest.config import PackingMode

# Enough rows to keep the matrix products busy on a CPU and on a large GPU alike.
FORWARD_TOKENS = 4096


def default_batch_contexts(seq_len: int, shard_contexts: int) -> int:
    """Contexts per forward where the user names none: about `FORWARD_TOKENS` tokens, a function of shapes alone."""
    return max(1, min(FORWARD_TOKENS // seq_len, shard_contexts))


class ShardForward:
    """Runs the trunk over a shard and leaves each hook's activations in CPU memory."""

    def __init__(
        self,
        trunk: PreTrainedModel,
        hooks: Sequence[Point],
        *,
        packing: PackingMode,
        batch_contexts: int,
        device: torch.device,
    ) -> None:
        """`packing` isolated keeps attention inside documents (see `shared.lm.packed`); separate runs each alone."""
        self.trunk = trunk
        self.hooks = list(hooks)
        self.packing = packing
        self.batch_contexts = batch_contexts
        self.device = device
        # Copies to the host run beside the next forward.
        self._copies = _new_stream(device) if device.type == "cuda" else None

    def run(
        self,
        tokens_NT: npt.NDArray[np.int32],
        segments_NT: npt.NDArray[np.int32],
        out: Mapping[str, Tensor],
        progress: Callable[[int], None] = lambda contexts: None,
        first_context: int = 0,
    ) -> torch.cuda.Event | None:
        """Fill ``out[hook]`` [N, T, D] (any float dtype, CPU) and call `progress` with the contexts of each forward.

        `first_context` is the number of the first row in the store. On a GPU the copies may still run: `out` is whole
        once the returned event has passed.
        """
        batch_contexts = 1 if self.packing is PackingMode.separate else self.batch_contexts
        with torch.no_grad(), capture(self.trunk, self.hooks) as captured:
            for start in range(0, len(tokens_NT), batch_contexts):
                rows = slice(start, min(start + batch_contexts, len(tokens_NT)))
                tokens_BT = torch.from_numpy(tokens_NT[rows].astype(np.int64)).to(self.device)
                segments_BT = torch.from_numpy(segments_NT[rows].astype(np.int64)).to(self.device)
                # Padding needs no mask: it lies behind all tokens, where causal attention keeps it from them.
                # Documents run alone go without it: some models look at the length of what they are given.
                if self.packing is PackingMode.separate:
                    length = document_length(segments_BT[0])
                    tokens_BT, segments_BT = tokens_BT[:, :length], segments_BT[:, :length]
                self.trunk(**self.inputs(tokens_BT, segments_BT, first_context + start))
                for hook in self.hooks:
                    length = tokens_BT.shape[1]
                    site = site_of(hook)
                    self._copy(captured.pop(hook), out[site][rows, :length])
                    out[site][rows, length:] = 0
                progress(len(tokens_BT))
        if self._copies is None:
            return None
        event: torch.cuda.Event = self._copies.record_event()
        return event

    def inputs(self, tokens_BT: Tensor, segments_BT: Tensor, first_context: int) -> dict[str, Any]:
        """Keyword arguments of the forward for some contexts, of which `first_context` is the first."""
        isolated = self.packing is PackingMode.isolated
        return packed_inputs(self.trunk, tokens_BT, segments_BT, isolated=isolated)

    def _copy(self, activation_BTD: Tensor, out_BTD: Tensor) -> None:
        if self._copies is None:
            out_BTD.copy_(activation_BTD)
            return
        converted = activation_BTD.to(out_BTD.dtype)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            out_BTD.copy_(converted, non_blocking=True)
        converted.record_stream(self._copies)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
