"""How examples are written into prompts: highlighted runs and whole-number activations. Conventions are recorded.

A piece is what tokens that share a character make together (`shared.latents.vocabulary`): a mark is never inside one.
"""

import re
from collections.abc import Sequence

import numpy as np

from shared.latents.examples import Example

EXPLAINER_SHARE = TEST_SHARE = 0.3
LISTED = 11  # (token, activation) pairs beside an example
LEVELS = 10

CONVENTIONS = {
    "explainer": "<<runs>> of tokens with a > 0.3 * the example's largest; the first 11 active tokens are listed with "
    "ceil(10 * a / the latent's largest), 1 to 10",
    "tests": "<<runs>> of tokens with a >= 0.3 * the largest of the window",
    "literal": "<< and >> of the text itself are written with a space between",
}


def plain(example: Example) -> str:
    """The text without marks."""
    return "".join(_unmarked(example))


def explained(example: Example) -> str:
    """The text with the highlighted runs of an explainer's prompt."""
    return marked(example, [peak > EXPLAINER_SHARE * example.value for peak in _peaks(example)])


def hot_pieces(example: Example) -> list[bool]:
    """Which pieces a fuzzing test highlights."""
    return [peak >= TEST_SHARE * example.value > 0 for peak in _peaks(example)]


def active_pieces(example: Example) -> list[bool]:
    """Pieces in which the latent fires at all, which no wrong mark may stand on."""
    return [peak > 0 for peak in _peaks(example)]


def marked(example: Example, hot: Sequence[bool]) -> str:
    """The text with runs of these pieces in ``<<`` and ``>>``."""
    found, is_open = "", False
    for text, is_hot in zip(_unmarked(example), hot, strict=True):
        if is_hot != is_open:
            found += "<<" if is_hot else ">>"
            is_open = is_hot
        found += text
    return found + (">>" if is_open else "")


def levels(example: Example, largest: float) -> list[int]:
    """ceil(10 a / largest) of each token, 0 to 10; never 0 for a token that is active."""
    scaled = np.ceil(LEVELS * np.maximum(example.values, 0) / largest) if largest > 0 else np.zeros(len(example.values))
    return [int(level) for level in np.clip(scaled, 0, LEVELS)]


def listed(example: Example, largest: float) -> str:
    """The first active tokens with their levels: ``(" def", 7), ...``."""
    pairs = zip(example.strings, levels(example, largest), strict=True)
    return ", ".join(f"({text!r}, {level})" for text, level in [pair for pair in pairs if pair[1]][:LISTED])


def runs(hot: Sequence[bool]) -> list[int]:
    """Lengths of the runs that are highlighted."""
    edges = np.flatnonzero(np.diff([False, *hot, False]))
    return [int(stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def misplaced(forbidden: Sequence[bool], lengths: Sequence[int], rng: np.random.Generator) -> list[bool] | None:
    """Runs of these lengths at random places, none of which touches another or a forbidden piece; None: no room."""
    taken = np.array(forbidden, bool)
    found = np.zeros(len(taken), bool)
    for length in sorted(lengths, reverse=True):
        near = np.convolve(found, [1, 1, 1], "same") > 0
        blocked = np.concatenate([[0], np.cumsum(taken | near)])
        starts = np.flatnonzero(blocked[length:] == blocked[:-length])
        if not len(starts):
            return None
        start = int(rng.choice(starts))
        found[start : start + length] = True
    return found.tolist()


def _peaks(example: Example) -> list[float]:
    return [float(example.values[piece.start : piece.stop].max()) for piece in example.pieces]


def _unmarked(example: Example) -> list[str]:
    """The pieces' texts without what looks like a mark, also where two pieces make one together."""
    found, last = [], ""
    for piece in example.pieces:
        parts = re.sub(r"(?<=<)(?=<)|(?<=>)(?=>)", " ", last + piece.text)
        found.append(parts[len(last) :])
        last = piece.text[-1:] or last
    return found
