"""What a spliced model has seen of its present sequence, slot by slot of the cache.

The cache is what a sequence is: a forward that begins where an earlier one has been already takes its place, as when
candidates of assisted decoding are rejected, and one that begins at slot 0 begins a sequence.

Legend: B rows of a batch, T positions, K slots of latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.sae.latents import SparseLatents

# What latents have of each token beside values and indices, where they have it.
BESIDE = ("token_mean", "token_scale", "skipped", "read")


@dataclass(frozen=True)
class Features:
    """Latents of every token of the last sequence that the model processed, [B, T, K] in order of position.

    After ``generate`` that is the sequence it returned, but for the last token, which is never fed back.
    """

    before: SparseLatents
    """As encoded."""
    after: SparseLatents
    """After the edits; equal to `before` where none applied."""
    applied: Tensor
    """bool [B, T]: where the SAE acted. Elsewhere the model's activation was left alone."""

    def up_to(self, length: int) -> "Features":
        """The first `length` positions."""
        return Features(_cut(self.before, length), _cut(self.after, length), self.applied[:, :length])

    def shaped(self, shape: torch.Size) -> "Features":
        """The same with other axes before that of the slots."""
        if self.applied.shape == shape:
            return self
        return Features(_shaped(self.before, shape), _shaped(self.after, shape), self.applied.reshape(shape))


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one forward."""

    tokens_BT: Tensor | None
    """None where embeddings were given."""
    is_padding_BT: Tensor
    features: Features | None = None
    """None until the hooked layer has run."""
    read_BTD: Tensor | None = None
    """What the dictionary read, where later tokens attend to it."""

    def up_to(self, length: int) -> "Part":
        """The first `length` positions."""
        return Part(
            None if self.tokens_BT is None else self.tokens_BT[:, :length],
            self.is_padding_BT[:, :length],
            None if self.features is None else self.features.up_to(length),
            None if self.read_BTD is None else self.read_BTD[:, :length],
        )


class Record:
    """The parts of the present sequence."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.first = 0
        """Slot of the first token on record."""

    def begin(self, part: Part, past: int) -> None:
        """A forward of `part` begins, `past` slots being filled: what is on record from there on is void."""
        if past > self.end or past < self.first or len(part.is_padding_BT) != self.rows:
            self.parts.clear()
        if not self.parts:
            self.first = past
        self.keep(past)
        self.parts.append(part)

    def fill(self, features: Features, read_BTD: Tensor | None = None) -> None:
        """What the hooked layer gave for the part that was begun last."""
        self.parts[-1] = replace(self.parts[-1], features=features, read_BTD=read_BTD)

    def keep(self, end: int) -> None:
        """Drop the slots from `end` on."""
        kept, slot = [], self.first
        for part in self.parts:
            width = part.is_padding_BT.shape[1]
            if slot < end:
                kept.append(part if slot + width <= end else part.up_to(end - slot))
            slot += width
        self.parts = kept

    @property
    def end(self) -> int:
        """The slot behind the last token on record."""
        return self.first + sum(part.is_padding_BT.shape[1] for part in self.parts)

    @property
    def rows(self) -> int:
        """The rows of the batch; 0 where nothing is on record."""
        return len(self.parts[0].is_padding_BT) if self.parts else 0

    def real_tokens(self) -> Tensor | None:
        """int64 [B]: tokens on record that are no padding; None where the record does not begin with the sequence."""
        if self.first or not self.parts:
            return None
        return (~self.padding()).sum(1)

    def padding(self) -> Tensor:
        """bool [B, slots on record]: those that hold padding."""
        return torch.cat([part.is_padding_BT for part in self.parts], dim=1)

    def read(self) -> Tensor | None:
        """What was read at all slots on record but those of the last part; None where that is not at hand."""
        found = [part.read_BTD for part in self.parts[:-1] if part.read_BTD is not None]
        return torch.cat(found, dim=1) if found and len(found) == len(self.parts) - 1 else None

    def is_of(self, tokens_BT: Tensor) -> bool:
        """Whether these are the tokens on record, those before the first on record aside."""
        if any(part.tokens_BT is None for part in self.parts) or self.end != tokens_BT.shape[1]:
            return False
        found = [part.tokens_BT for part in self.parts if part.tokens_BT is not None]
        return self.rows == len(tokens_BT) and torch.equal(torch.cat(found, dim=1), tokens_BT[:, self.first :])

    def features(self) -> Features | None:
        """The features of all tokens on record; None before the first."""
        found = [part.features for part in self.parts if part.features is not None]
        if not found:
            return None
        return Features(
            before=join([one.before for one in found]),
            after=join([one.after for one in found]),
            applied=torch.cat([one.applied for one in found], dim=1),
        )


def widen(values: Tensor, width: int, fill: int) -> Tensor:
    """Append slots up to `width`."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)


def join(parts: Sequence[SparseLatents]) -> SparseLatents:
    """Latents of consecutive positions as one, [B, sum of T, largest K]."""
    width = max(part.values.shape[-1] for part in parts)
    beside = {name: [getattr(part, name) for part in parts] for name in BESIDE}
    return SparseLatents(
        torch.cat([widen(part.values, width, 0) for part in parts], dim=1),
        torch.cat([widen(part.indices, width, -1) for part in parts], dim=1),
        **{name: None if found[0] is None else torch.cat(found, dim=1) for name, found in beside.items()},
    )


def _cut(latents: SparseLatents, length: int) -> SparseLatents:
    return _each(latents, lambda one: one[:, :length])


def _shaped(latents: SparseLatents, shape: torch.Size) -> SparseLatents:
    return _each(latents, lambda one: one.reshape(*shape, one.shape[-1]))


def _each(latents: SparseLatents, fn: Callable[[Tensor], Tensor]) -> SparseLatents:
    """The latents with `fn` done to all that they have of each token."""
    beside = {name: getattr(latents, name) for name in BESIDE}
    return SparseLatents(
        fn(latents.values),
        fn(latents.indices),
        **{name: None if found is None else fn(found) for name, found in beside.items()},
    )
