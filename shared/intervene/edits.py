"""Changing single latents: edits on the sparse form that equal edits of the dense latent vector.

Legend: N tokens, K slots of a token, E edited latents, F d_latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.intervene.where import Where
from shared.sae.latents import SparseLatents

Mode = Literal["set", "add", "multiply"]
MODES: tuple[Mode, ...] = ("set", "add", "multiply")


@dataclass(frozen=True)
class Edit:
    """What happens to some latents: ``set`` f to v, ``add`` v to f, or ``multiply`` f by v.

    An inactive latent has the value 0, so setting it to 0 or multiplying it changes nothing. Results are not clamped:
    adding a negative value may leave a latent negative, as it does in the dense vector.
    """

    latents: Sequence[int]
    mode: Mode
    value: float | Sequence[float]
    """One value for all of `latents`, or one each."""
    where: Where | None = None
    """Kinds of tokens, or regions of an image; None: wherever the dictionary acts."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise GranaryError(f"edit mode {self.mode!r} is not known: choose from {', '.join(MODES)}")
        if len(set(self.latents)) < len(self.latents):
            raise GranaryError("an edit names a latent twice: name each once")
        if not isinstance(self.value, int | float) and len(self.value) != len(self.latents):
            raise GranaryError(
                f"an edit of {len(self.latents)} latents has {len(self.value)} values: give one, or one each"
            )

    def values(self) -> list[float]:
        """One value for each latent."""
        if isinstance(self.value, int | float):
            return [float(self.value)] * len(self.latents)
        return [float(value) for value in self.value]


def check_edits(edits: Sequence[Edit], d_latent: int) -> None:
    """Raise GranaryError for a latent that does not exist, or that two edits name (their order would matter)."""
    named = [latent for edit in edits for latent in edit.latents]
    for latent in named:
        if not 0 <= latent < d_latent:
            raise GranaryError(f"latent {latent} is not in the SAE: it has {d_latent}, 0 to {d_latent - 1}")
    twice = {latent for latent in named if named.count(latent) > 1}
    if twice:
        raise GranaryError(f"latent {min(twice)} is named by two edits: join them into one")


def apply_edits(
    latents: SparseLatents, edits: Sequence[Edit], masks: Sequence[Tensor | None] | None = None
) -> SparseLatents:
    """The latents after all `edits`; the slots of edited latents move to the end, K grows by their number.

    Equal to editing the dense [..., F] vector. The order of the edits and of their latents does not matter. `masks` has
    for each edit where it acts, bool [...], or None: everywhere, as all do without `masks`.
    """
    values, indices = latents.values, latents.indices
    for edit, mask in zip(edits, [None] * len(edits) if masks is None else masks, strict=True):
        target_E = torch.tensor(list(edit.latents), device=indices.device)
        amount_E = torch.tensor(edit.values(), device=values.device, dtype=values.dtype)
        hit_KE = indices[..., :, None] == target_E
        current_E = (values[..., :, None] * hit_KE).sum(-2)
        match edit.mode:
            case "set":
                edited_E = amount_E.expand_as(current_E)
            case "add":
                edited_E = current_E + amount_E
            case "multiply":
                edited_E = current_E * amount_E
        if mask is not None:
            edited_E = torch.where(mask[..., None], edited_E, current_E)
        kept = ~hit_KE.any(-1)
        target = torch.where(edited_E != 0, target_E, -1)
        values = torch.cat([torch.where(kept, values, 0), edited_E], -1)
        indices = torch.cat([torch.where(kept, indices, -1), target], -1)
    return replace(latents, values=values, indices=indices)


def reached(masks: Sequence[Tensor | None]) -> Tensor | None:
    """bool [...]: where any edit acts; None where one acts everywhere, and without edits."""
    found: Tensor | None = None
    for mask in masks:
        if mask is None:
            return None
        found = mask if found is None else found | mask
    return found


def apply_edits_by_eviction(latents: SparseLatents, edits: Sequence[Edit]) -> SparseLatents:
    """The edits as OpenSAE makes them: a token keeps its K slots, so an inactive latent takes over a slot.

    ``set`` and ``add`` on a latent that is not active put it, with the given value, into the slot of the smallest
    value, whose latent is lost; ``multiply`` then does nothing. Latents are edited in the order given, and may evict
    one another. For parity with figures made with OpenSAE; `apply_edits` has none of these effects.
    """
    values, indices = latents.values.clone(), latents.indices.clone()
    for edit in edits:
        for latent, amount in zip(edit.latents, edit.values(), strict=True):
            hit = indices == latent
            active = hit.any(-1, keepdim=True)
            match edit.mode:
                case "set":
                    values = torch.where(hit, amount, values)
                case "add":
                    values = torch.where(hit, values + amount, values)
                case "multiply":
                    values = torch.where(hit, values * amount, values)
            if edit.mode != "multiply":
                slot = values.argmin(-1, keepdim=True)
                evicted = torch.zeros_like(hit).scatter_(-1, slot, ~active)
                values = torch.where(evicted, amount, values)
                indices = torch.where(evicted, latent, indices)
    return replace(latents, values=values, indices=indices)
