"""Where the tokens of a forward are in their sequences, and on which of them a splice acts.

Legend: B rows of a batch, T positions of one forward, P chosen positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.intervene.padding import padding_of
from shared.intervene.record import Part, Record
from shared.intervene.where import Tokens
from shared.intervene.whole import Whole
from shared.lm.calls import filled_slots


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of one forward are."""

    position_BT: Tensor
    """int64: position in the row, padding not counted."""
    is_padding_BT: Tensor
    is_bos_BT: Tensor
    prompt_B: Tensor | None
    """int64 [B]: length of each row's prompt, padding not counted; None where the forward continues one unknown."""


@dataclass(frozen=True)
class Forward:
    """One forward of a model."""

    tokens: TokenPlaces | None
    """None where it is not over tokens."""
    whole: Whole | None = None
    """For a dictionary that attends, where it is over tokens."""
    masks: Sequence[Tensor | None] = ()
    """bool [B, T]: where each edit acts; None: everywhere."""


@dataclass(frozen=True)
class Choice:
    """Which tokens are acted on."""

    positions: Tensor | None
    """int64 [P], negative ones counted from the prompt's end; None: all."""
    prompt_only: bool
    include_bos: bool
    include_padding: bool

    @property
    def needs_tokens(self) -> bool:
        """Whether it means anything only where activations are those of tokens."""
        return self.prompt_only or self.positions is not None

    def of(self, places: TokenPlaces) -> Tensor:
        """bool [B, T]: the tokens that are acted on. Raises GranaryError where it takes a prompt that is not known."""
        acts_BT = torch.ones_like(places.is_padding_BT) if self.include_padding else ~places.is_padding_BT
        if not self.include_bos:
            acts_BT = acts_BT & ~places.is_bos_BT
        if self.prompt_only:
            acts_BT = acts_BT & (places.position_BT < _known(places)[:, None])
        if self.positions is not None:
            wanted = self.positions.to(places.position_BT.device)
            from_end = bool((self.positions < 0).any())
            wanted_BP = torch.where(wanted < 0, wanted + _known(places)[:, None], wanted) if from_end else wanted[None]
            acts_BT = acts_BT & (places.position_BT[:, :, None] == wanted_BP[:, None, :]).any(-1)
        return acts_BT


def takes_tokens(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether the model is one of transformers that is called with token ids, or embeddings in their place."""
    return isinstance(model, PreTrainedModel) and model.main_input_name == "input_ids"


def token_places(
    model: PreTrainedModel, named: Mapping[str, Any], record: Record, prompt: Tensor | None
) -> TokenPlaces:
    """Where the tokens are of the forward that is called with `named` arguments; it begins a part of `record`.

    `prompt` is the padding mask [rows, tokens] of what ``generate`` was given, if it runs. Raises GranaryError where
    there are no tokens.
    """
    tokens: Tensor | None = named.get("input_ids")
    inputs: Tensor | None = tokens if tokens is not None else named.get("inputs_embeds")
    if inputs is None:
        raise GranaryError("the model was called without input_ids or inputs_embeds")
    shape, device, past = inputs.shape[:2], inputs.device, filled_slots(named)
    mask: Any = named.get("attention_mask")
    if prompt is not None:  # beams and several sequences per prompt repeat the rows
        rows = prompt.to(device).repeat_interleave(shape[0] // len(prompt), dim=0)
        mask = torch.nn.functional.pad(rows, (0, max(0, past + shape[1] - rows.shape[1])), value=1)
    elif named.get("document_spans") is not None:
        mask = None  # the one beside them is a placeholder
    is_padding_BT = padding_of(mask, past, shape, device)
    part = Part(tokens, is_padding_BT)
    record.begin(part, past)
    bos = model.config.get_text_config().bos_token_id
    is_bos_BT = tokens == bos if tokens is not None and bos is not None else torch.zeros_like(is_padding_BT)
    prompt_B: Tensor | None = (~is_padding_BT).sum(1)
    if prompt is not None:
        prompt_B = prompt.sum(1).to(device).repeat_interleave(len(is_padding_BT) // len(prompt))
    elif past:
        prompt_B = None
    return TokenPlaces(_positions(part, past, named.get("position_ids"), record), is_padding_BT, is_bos_BT, prompt_B)


def tokens_of(places: TokenPlaces, record: Record) -> Tokens:
    """The tokens of the forward that is the last part of `record`, and what is known of those before."""
    parts = record.parts
    before = [part.tokens_BT for part in parts[:-1] if part.tokens_BT is not None]
    rows = places.is_padding_BT.new_zeros(len(places.is_padding_BT), 0, dtype=torch.int64)
    is_known = record.first == 0 and len(before) == len(parts) - 1
    is_generated_BT, is_end = None, False
    if places.prompt_B is not None:
        is_generated_BT = (places.position_BT >= places.prompt_B[:, None]) & ~places.is_padding_BT
        now_B = (~places.is_padding_BT & ~is_generated_BT).sum(1)
        is_end = bool((now_B > 0).any()) and not bool((places.position_BT.max(1).values < places.prompt_B - 1).any())
    return Tokens(
        parts[-1].tokens_BT, places.is_padding_BT, is_generated_BT,
        torch.cat([rows, *before], 1) if is_known else None, is_end,
    )  # fmt: skip


def _positions(part: Part, past: int, given: Tensor | None, record: Record) -> Tensor:
    """int64 [B, T]: of each token in its row, padding not counted."""
    real_B = record.real_tokens()
    if real_B is not None:
        now_BT = (~part.is_padding_BT).long()
        return (real_B[:, None] - now_BT.sum(1, keepdim=True) + now_BT.cumsum(1) - 1).clamp_min(0)
    counted_T = torch.arange(past, past + part.is_padding_BT.shape[1], device=part.is_padding_BT.device)
    is_plain = given is not None and given.dim() <= 2  # of images in a sequence there are three per token
    return (given if is_plain and given is not None else counted_T).expand(part.is_padding_BT.shape)


def _known(places: TokenPlaces) -> Tensor:
    if places.prompt_B is None:
        raise GranaryError("prompt_only and negative positions need spliced.generate(...), which knows the prompt")
    return places.prompt_B
