"""The examples of one latent that explanations are made from, and those that they are tested on.

For the explanation: the strongest records and an even choice of the uniform sample, with the text around each peak. For
the test: windows of the uniform sample, which stand for all windows in which the latent fires, and windows in which it
was seen to be silent, both as whole windows: neither kind can be told by its shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from shared.latents.examples import DECILES, Example
from shared.latents.folder import Latents
from stage_inspect.explain.sides import Side, Sides

FEWEST = 4  # examples without which a latent can't be explained, or not be tested
SILENT_LOOKED_AT = 8  # times as many silent windows as are wanted: half of them are of the other side

Shown = TypeVar("Shown")
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Tested:
    """An example of the test."""

    example: Example
    is_active: bool
    quantile: int | None
    """0 (strongest) to 9: its tenth of all windows in which the latent fires; None for a silent one."""

    @property
    def place(self) -> tuple[int, int]:
        """(context, position of the window's first token)."""
        return self.example.context, self.example.start

    @property
    def record(self) -> dict[str, Any]:
        """What is kept of it where it was judged wrongly, as the explorer shows it."""
        one = self.example
        return {
            "tokens": one.tokens.tolist(),
            "values": [round(value, 4) for value in one.values.tolist()],
            "peak": one.peak,
            "place": [one.context, one.start + one.peak],
        }


@dataclass(frozen=True)
class BothSides(Generic[Shown, Asked]):
    """What is shown of one latent, and what is tested on."""

    TO_EXPLAIN: ClassVar[str]
    TO_TEST: ClassVar[tuple[str, str]]
    """What `train`, and what `active` and `silent` hold, in the words of the line that says there are too few."""

    latent: int
    train: list[Shown]
    active: list[Asked]
    silent: list[Asked]

    @property
    def why_not_explained(self) -> str | None:
        """Why no explanation can be made of it, or None."""
        return None if len(self.train) >= FEWEST else f"{len(self.train)} {self.TO_EXPLAIN}, {FEWEST} are needed"

    @property
    def why_not_tested(self) -> str | None:
        """Why no score can be had of it, or None."""
        for found, what in zip((self.active, self.silent), self.TO_TEST, strict=True):
            if len(found) < FEWEST:
                return f"{len(found)} {what}, {FEWEST} are needed"
        return None

    @property
    def tested(self) -> list[Asked]:
        """All of the test, in an order that does not tell which are which."""
        both = self.active + self.silent
        return [both[number] for number in np.random.default_rng(self.latent).permutation(len(both))]


@dataclass(frozen=True)
class Chosen(BothSides[Example, Tested]):
    """Examples of one latent on both sides."""

    TO_EXPLAIN = "examples in the documents for explanations"
    TO_TEST = (
        "windows of the documents for tests in which it fires",
        "windows of the documents for tests in which it is silent",
    )

    train_silent: list[Example]
    """Of the training documents, for the explainer that contrasts."""


def choose(latents: Latents, index: int, sides: Sides, num_train: int, num_test: int) -> Chosen:
    """Examples of a latent: at most `num_train` of one side; of the other `num_test` active and as many silent."""
    records, num_top = latents.records(index)
    seen: set[bytes] = set()
    train = _distinct(_of(latents.top(index), sides, "train"), seen, num_train // 2)
    train += _distinct(_spread(_of(latents.sample(index), sides, "train")), seen, num_train - len(train))
    seen = {one.tokens.tobytes() for one in train}
    sampled = records.take(range(num_top, len(records)))
    windows = latents.examples(sampled, within_window=True)
    ranked = [(rank * DECILES // len(windows), one) for rank, one in enumerate(windows)]
    active = []
    for quantile in range(DECILES):
        wanted = num_test * (quantile + 1) // DECILES - num_test * quantile // DECILES
        tenth = _of([one for number, one in ranked if number == quantile], sides, "test")
        active += [Tested(one, True, quantile) for one in _distinct(_spread(tenth), seen, wanted)]
    quiet = latents.silent(index, SILENT_LOOKED_AT * num_test)
    silent = [Tested(one, False, None) for one in _distinct(_of(quiet, sides, "test"), seen, num_test)]
    return Chosen(index, train, active, silent, _of(quiet, sides, "train")[: num_train // 2])


def _of(examples: list[Example], sides: Sides, side: Side) -> list[Example]:
    return [one for one in examples if sides.of(one) == side]


def _spread(examples: list[Example]) -> list[Example]:
    """All of them, so ordered that the first n are spread over the ranks, for every n (by reversed bits)."""
    bits = max(1, (len(examples) - 1).bit_length())
    turned: Callable[[int], int] = lambda number: int(format(number, f"0{bits}b")[::-1], 2)  # noqa: E731
    return [examples[number] for number in sorted(range(len(examples)), key=turned)]


def _distinct(examples: list[Example], seen: set[bytes], most: int) -> list[Example]:
    """The first of them with a text that was not seen; their texts count as seen."""
    found: list[Example] = []
    for one in examples:
        text = one.tokens.tobytes()
        if len(found) < most and text not in seen:
            seen.add(text)
            found.append(one)
    return found
