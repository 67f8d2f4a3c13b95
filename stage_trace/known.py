"""What latents folders know of the features of a graph: a name, examples, tokens, and the logits that they write for.

A folder belongs to the dictionary whose weights it was made from, by their hash; where it lies does not matter. Those
beside the dictionaries are found by themselves.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from shared.basics.run_folder import WEIGHTS_FILE
from shared.latents import Example, Latents
from shared.latents.layout import NONE
from shared.lm.hookpoint import HookPoint
from shared.sae.folder import is_own
from shared.sae.for_store import weights_sha256
from stage_trace.nodes import Kind, Node
from stage_trace.session import Source

log = logging.getLogger(__name__)

BESIDE = "latents"
EXAMPLES, TOKENS = 4, 8
AROUND = 20
"""Tokens of an example before and behind its peak."""


@dataclass(frozen=True, slots=True)
class Known:
    """The latents folder of each group of latents, by the group's own output, and their numbers in it."""

    by_output: dict[HookPoint, tuple[Latents, range]]

    @classmethod
    def find(cls, sources: Sequence[Source], given: Sequence[str] | None) -> "Known":
        """Look into the folders `given`, or into those beside the dictionaries where it is None.

        Raises GranaryError for a given folder that is none, or that was made from none of the dictionaries.
        """
        paths = list(_beside(sources)) if given is None else [Path(one) for one in given]
        opened = [Latents.open(path) for path in paths]
        by_hash = {str(one.meta.dictionary.get("sha256")): one for one in opened}
        found: dict[HookPoint, tuple[Latents, range]] = {}
        used = set()
        for source in sources if by_hash else []:
            folder = Path(source.name)
            latents = by_hash.get(weights_sha256(folder)) if (folder / WEIGHTS_FILE).is_file() else None
            if latents is not None:
                used.add(latents.url)
                each = latents.num_latents // len(source.places)
                found |= {
                    place.own: (latents, range(number * each, (number + 1) * each))
                    for number, place in enumerate(source.places)
                }
        for one in opened:
            if one.url not in used:
                told = (
                    f"{one.url} was made from other weights than any dictionary of the graph: run granary inspect again"
                )
                if given is not None:
                    raise GranaryError(told)
                log.warning("%s", told)
        return cls(found)

    def name(self, node: Node) -> str:
        """What a person or an explanation calls a feature; empty where nothing does."""
        return self.name_of(node.output, node.number) if node.kind is Kind.feature else ""

    def name_of(self, output: HookPoint, latent: int) -> str:
        """The same of a latent of a group."""
        if output not in self.by_output:
            return ""
        latents, numbers = self.by_output[output]
        return latents.notes.name(numbers[latent]) or ""

    def words(self, output: HookPoint, most: int) -> tuple[list[list[str]], list[list[str]]]:
        """Return the tokens on which each of a group's latents fires and for which it writes; empty where not known."""
        if output not in self.by_output:
            return [], []
        latents, numbers = self.by_output[output]
        vocabulary = latents.vocabulary

        def of(path: str) -> list[list[str]]:
            if vocabulary is None or not latents.has(path):
                return []
            rows = latents.array(path).rows(numbers.start, numbers.stop)[:, :most].tolist()
            return [[vocabulary.text_of(token) for token in row if token != NONE] for row in rows]

        return of("tokens/firing"), of("logits/top")

    def card(self, node: Node) -> dict[str, Any] | None:
        """What the page shows of a feature; None where no folder knows it."""
        if node.kind is not Kind.feature or node.output not in self.by_output:
            return None
        latents, numbers = self.by_output[node.output]
        one = latents.latent(numbers[node.number])
        return {
            "folder": latents.url,
            "number": one.index,
            "fired": float(one.numbers["fired"]) / max(1, latents.meta.counts["tokens"]),
            "max": float(one.numbers["max"]),
            "tokens": [[token.text, token.share] for token in one.tokens[:TOKENS]],
            "promoted": [weight.text for weight in one.promoted[:TOKENS]],
            "demoted": [weight.text for weight in one.demoted[:TOKENS]],
            "examples": [_around(example) for example in latents.top(one.index, EXAMPLES)],
        }


def _beside(sources: Sequence[Source]) -> Iterable[Path]:
    """Folders called latents in a dictionary's folder, or beside it."""
    folders = dict.fromkeys(Path(source.name) for source in sources if is_own(Path(source.name)))
    places = dict.fromkeys(place / BESIDE for folder in folders for place in (folder, folder.parent))
    return [place for place in places if (place / "meta.json").is_file()]


def _around(example: Example) -> dict[str, Any]:
    """The tokens near the peak, and how strongly each fires, in tenths of the peak."""
    near = slice(max(0, example.peak - AROUND), example.peak + AROUND)
    tenths = np.clip(np.round(10 * example.values[near] / max(example.value, 1e-30)), 0, 10)
    return {
        "pieces": example.strings[near],
        "heat": tenths.astype(int).tolist(),
        "value": float(f"{example.value:.4g}"),
    }
