"""Forward passes over packed contexts in which documents do not see one another.

Shapes: B contexts, T positions, H heads, E head dimension.

Two ways, chosen by the model's attention implementation:

* ``sdpa`` (the default): attention runs document by document, each with the causal kernel and no mask. A T x T mask
  would make the kernels slow, and would cost the attention between documents that it then throws away.
* the others: position ids that restart. transformers (``masking_utils.find_packed_sequence_indices``) makes the
  block-diagonal mask from them, or for flash attention the variable-length form, given no attention mask and no cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DOCUMENT_SDPA = "granary_document_sdpa"

Spans = list[list[tuple[int, int]]]
"""Per context, the [start, end) of each document."""


def packed_inputs(model: PreTrainedModel, tokens_BT: Tensor, segments_BT: Tensor, *, isolated: bool) -> dict[str, Any]:
    """Keyword arguments of `model`'s forward for packed contexts; both tensors int64 on the model's device.

    `segments_BT` holds the document index of each position; padding, at the end, counts as a document. Not `isolated`:
    each context is one causal sequence.
    """
    inputs: dict[str, Any] = {"input_ids": tokens_BT, "use_cache": False}
    if isolated:
        inputs["position_ids"] = segment_positions(segments_BT)
        if model.config._attn_implementation == DOCUMENT_SDPA:
            inputs["document_spans"] = document_spans(segments_BT)
            # transformers hands a mask of four dimensions through as it is: this one, never read, stops it from
            # building the T x T one.
            inputs["attention_mask"] = torch.empty(len(tokens_BT), 1, 1, 1, dtype=torch.bool, device=tokens_BT.device)
    return inputs


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Positions that restart at 0 wherever the document index changes along T; int64 [B, T]."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    start_BT = torch.where(_is_start(segments_BT), index_T, 0).cummax(dim=1).values
    return index_T - start_BT


def document_length(segments_T: Tensor) -> int:
    """Positions of the one document of a context; padding, marked -1, follows it."""
    return int((segments_T >= 0).sum())


def document_spans(segments_BT: Tensor) -> Spans:
    """Where each document of each context begins and ends."""
    T = segments_BT.shape[1]
    spans: Spans = []
    for is_start_T in _is_start(segments_BT).cpu():
        starts = torch.nonzero(is_start_T).flatten().tolist()
        spans.append(list(zip(starts, [*starts[1:], T], strict=True)))
    return spans


def _is_start(segments_BT: Tensor) -> Tensor:
    is_start_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return is_start_BT


def document_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    attention_mask: Tensor | None,
    document_spans: Spans | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, one document at a time where `document_spans` says what the documents are.

    Returns [B, T, H, E]. A forward without spans is plain sdpa.
    """
    if document_spans is None:
        return sdpa_attention_forward(module, query_BHTE, key_BHTE, value_BHTE, attention_mask, **kwargs)
    rows = []
    for b, spans in enumerate(document_spans):
        parts = []
        for start, end in spans:
            q, k, v = (x[b : b + 1, :, start:end] for x in (query_BHTE, key_BHTE, value_BHTE))
            window = None
            if sliding_window is not None and end - start > sliding_window:
                window = _window_mask(end - start, sliding_window, q.device)
            parts.append(sdpa_attention_forward(module, q, k, v, window, **kwargs)[0])
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True where a query may look: at itself and the `window` - 1 positions before it; [1, 1, L, L]."""
    index_L = torch.arange(length, device=device)
    distance_LL = index_L[:, None] - index_L[None, :]
    return ((distance_LL >= 0) & (distance_LL < window))[None, None]


AttentionInterface.register(DOCUMENT_SDPA, document_attention)
AttentionMaskInterface.register(DOCUMENT_SDPA, sdpa_mask)
