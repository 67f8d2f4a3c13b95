"""Position ids of packed documents, which is also how attention is told where a document ends.

transformers (``masking_utils.find_packed_sequence_indices``) builds a block-diagonal causal mask from position ids
that restart, provided no attention mask and no cache are given; flash attention takes the same ids as its
variable-length form. So one tensor gives both: documents that start at position 0 and never see one another.
"""

import torch
from torch import Tensor


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Positions that restart at 0 wherever the document index changes along T; int64 [B, T].

    `segments_BT` holds the document index of each position, any integer dtype; padding counts as a document.
    """
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    is_start_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=1).values
    return index_T - start_BT
