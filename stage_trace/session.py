"""One prompt, recorded once: what its rows, its nodes and its interventions are computed from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.frozen import Recording, run
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearParts, linear_parts
from shared.sae.config import DictionaryConfig
from shared.sae.variants import Dictionary
from stage_trace.group_weights import GroupRows, HeldRows
from stage_trace.leaves import Columns
from stage_trace.nodes import Node
from stage_trace.places import Place, check_places
from stage_trace.replacement import Part, Replacement, read_parts, stand_in


def held_rows(dictionary: Dictionary) -> list[GroupRows]:
    """Rows of a dictionary that stays in memory."""
    return [HeldRows(group) for group in dictionary.groups]


@dataclass(frozen=True, slots=True)
class Source:
    """A dictionary that is opened when its layer's turn comes, so that no two lie in memory at once."""

    name: str
    places: tuple[Place, ...]
    open: Callable[[], Dictionary]
    rows: Callable[[Dictionary], Sequence[GroupRows]] = held_rows
    """Of each group of the dictionary that was opened: from its file, or from its parameters."""
    config: DictionaryConfig | None = None
    """Of a dictionary that is not in memory."""
    model: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What it records of the language model that it was taught."""


@dataclass(frozen=True, slots=True)
class Session:
    """A prompt and its local replacement model."""

    model: PreTrainedModel
    parts: LinearParts
    tokens_T: Tensor
    recording: Recording
    replacement: Replacement
    sources: dict[HookPoint, tuple[Source, int]]
    """By their own output: a dictionary, and which of its groups."""

    @property
    def columns(self) -> Columns:
        """The columns of all active features."""
        return Columns.of(self.replacement)

    def numbers(self, nodes: Iterable[Node]) -> Tensor:
        """Which of all active features these nodes are, int64."""
        wanted = [(node.output, node.position, node.number) for node in nodes]
        found: dict[tuple[HookPoint, int, int], int] = {}
        start = 0
        for one in self.replacement.stand_ins:
            latents = one.latents
            if any(output == one.output for output, _, _ in wanted):
                pairs = zip(latents.position_N.tolist(), latents.latent_N.tolist(), strict=True)
                found |= {(one.output, *pair): start + number for number, pair in enumerate(pairs)}
            start += len(latents.value_N)
        return torch.tensor([found[key] for key in wanted], dtype=torch.int64, device=self.tokens_T.device)


@torch.no_grad()
def record(model: PreTrainedModel, sources: Sequence[Source], tokens_T: Tensor, fixed_T: Tensor) -> Session:
    """One forward pass of `model` over `tokens_T`, and what each of `sources` makes of it.

    `fixed_T`, bool [T], are the positions that no dictionary was taught. Raises GranaryError for a model or sources
    that graphs do not know, and for a prompt without a free position.
    """
    parts = linear_parts(model)
    depth = len(parts.layers)
    check_places([(source.name, place) for source in sources for place in source.places], depth)
    if bool(fixed_T.all()):
        raise GranaryError("the prompt has no token that a dictionary was taught: give it some text")
    places = [place for source in sources for place in source.places]
    attended = {place.own for place in places if place.own.site == "attn_out"}
    inputs = [HookPoint(layer, "attn_in") for layer in range(depth)]
    recording = run(model, parts, tokens_T, [*(place.read for place in places), *inputs, *sorted(attended)])
    found: dict[HookPoint, Part] = {}
    by_output: dict[HookPoint, tuple[Source, int]] = {}
    for source in sources:
        dictionary = source.open()
        found |= read_parts(dictionary, source.rows(dictionary), source.places, recording, fixed_T)
        del dictionary  # before the next one is opened
        by_output |= {place.own: (source, number) for number, place in enumerate(source.places)}
    branches = (HookPoint(layer, site) for layer in range(depth) for site in ("attn_out", "mlp_out"))
    outputs = [one for one in branches if one.site == "mlp_out" or one in attended]
    stand_ins = [stand_in(found, output, recording, fixed_T) for output in outputs]
    return Session(model, parts, tokens_T, recording, Replacement(stand_ins, fixed_T), by_output)
