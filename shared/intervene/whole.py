"""What a Lorsa needs of a forward beside activations: which of its tokens see one another, and what came before them.

A Lorsa's patterns are causal within documents, at positions that count up by one. A forward whose tokens see one
another otherwise is refused: the Lorsa would read from other tokens than the attention that it stands in for.

Legend: B rows, T positions of the forward, P slots of the cache before it, S = P + T, D width of what is read, K slots
of latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.intervene.padding import attended
from shared.intervene.record import Record
from shared.kernels.attention.pattern import may_attend
from shared.lm.calls import cache_of
from shared.sae.contexts import Contexts
from shared.sae.latents import SparseLatents
from shared.sae.variants import Lorsa


@dataclass(frozen=True)
class Whole:
    """The sequences that a forward begins or goes on with."""

    lorsa: Lorsa
    documents_BS: Tensor
    """int64: what sees itself alone, numbered within its row; -1 for padding."""
    earlier_BPD: Tensor | None
    """What was read at the slots before; None: the forward begins the sequence."""

    def encode(self, x: Tensor) -> SparseLatents:
        """Latents of the forward's activations, [B, T, D] or [B T, D], with K slots in the place of D."""
        rows_BSD = x.reshape(len(self.documents_BS), -1, x.shape[-1])
        T = rows_BSD.shape[1]
        if self.earlier_BPD is not None:
            rows_BSD = torch.cat([self.earlier_BPD.to(rows_BSD), rows_BSD], 1)
        counts_BS = self.documents_BS >= 0
        counts_BS[:, :-T] = False
        given = Contexts.of(rows_BSD, self.documents_BS, counts_BS)
        latents = self.lorsa.encode(given)

        def own(of_counted_NK: Tensor) -> Tensor:
            return given.spread(of_counted_NK)[:, -T:].reshape(*x.shape[:-1], -1)

        return SparseLatents(own(latents.values), own(latents.indices + 1) - 1)


def whole_of(
    model: PreTrainedModel, named: Mapping[str, Any], record: Record, lorsa: Lorsa, *, generates: bool
) -> Whole:
    """Return those of the forward that is called with `named` arguments, which is the last part of `record`.

    `generates`: whether it is one of ``generate``, whose tokens see all before them and whose cache keeps its rows.
    Raises GranaryError where earlier tokens are not at hand, and where tokens see one another as in no Lorsa.
    """
    padding_BS = record.padding()
    past = padding_BS.shape[1] - record.parts[-1].is_padding_BT.shape[1] + record.first
    earlier_BPD = record.read()
    if past and (record.first or earlier_BPD is None or not generates):
        raise GranaryError(
            "a lorsa attends to earlier tokens, and of a cache it has those of spliced.generate(...) alone: call that, "
            "or give whole sequences with use_cache=False"
        )
    is_new_BS = torch.zeros_like(padding_BS) if generates else _beginnings(model, named, padding_BS, lorsa)
    if lorsa.config.frequencies and bool((_jumps(named, padding_BS, past) & ~is_new_BS).any()):
        raise GranaryError(
            "a lorsa counts positions up by one, and these position_ids jump where tokens see one another: leave them "
            "out, or give use_cache=False and no attention_mask, with which a model isolates what begins at 0"
        )
    real_BS = ~padding_BS
    ends_BS = torch.nn.functional.pad(real_BS, (0, 1))
    if int((real_BS & ~ends_BS[:, 1:]).sum(1).max()) > 1:
        raise GranaryError("a lorsa counts positions without gaps, and padding lies between tokens: pad at the ends")
    return Whole(lorsa, is_new_BS.cumsum(1).masked_fill(padding_BS, -1), earlier_BPD)


def _beginnings(model: PreTrainedModel, named: Mapping[str, Any], padding_BT: Tensor, lorsa: Lorsa) -> Tensor:
    """bool [B, T]: where a document begins that does not see those before it, in a forward that begins a sequence."""
    mask, spans = named.get("attention_mask"), named.get("document_spans")
    if spans is not None:
        is_new_BT = torch.zeros_like(padding_BT)
        for row, own in enumerate(spans):
            is_new_BT[row, [start for start, _ in own if start]] = True
        return is_new_BT
    if mask is None and not _caches(model, named):  # transformers then takes positions that jump for documents
        return _jumps(named, padding_BT, 0)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return torch.zeros_like(padding_BT)
    return _by_mask(attended(mask, padding_BT.shape, padding_BT.device), padding_BT, lorsa)


def _by_mask(sees_BTT: Tensor, padding_BT: Tensor, lorsa: Lorsa) -> Tensor:
    """The same by who sees whom. Raises GranaryError where that is no causal attention within documents."""
    is_new_BT = torch.zeros_like(padding_BT)
    is_new_BT[:, 1:] = ~sees_BTT.diagonal(-1, 1, 2) & ~padding_BT[:, :-1]
    documents_BT, real_BT = is_new_BT.cumsum(1).masked_fill(padding_BT, -1), ~padding_BT
    possible = (may_attend(documents_BT, window)[real_BT] for window in (None, lorsa.config.window))
    if not any(torch.equal(sees_BTT[real_BT], one) for one in possible):
        raise GranaryError(
            "a lorsa attends causally within documents, and this attention_mask says otherwise: give one of padding, "
            "[rows, tokens]"
        )
    return is_new_BT


def _caches(model: PreTrainedModel, named: Mapping[str, Any]) -> bool:
    """Whether the forward fills a cache."""
    asked = named.get("use_cache")
    is_asked = model.config.get_text_config().use_cache if asked is None else asked
    return bool(is_asked) or cache_of(named) is not None


def _jumps(named: Mapping[str, Any], padding_BS: Tensor, past: int) -> Tensor:
    """bool [B, S]: tokens of the forward whose position does not follow that of the token before them in it."""
    found_BS, given = torch.zeros_like(padding_BS), named.get("position_ids")
    if isinstance(given, Tensor) and given.dim() <= 2:
        position_BT = given.to(padding_BS.device).expand(len(padding_BS), -1)
        both_BT = ~padding_BS[:, past + 1 :] & ~padding_BS[:, past:-1]
        found_BS[:, past + 1 :] = both_BT & (position_BT.diff(dim=1) != 1)
    return found_BS
