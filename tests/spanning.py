"""Which of many combinations the default tests try: each value with each form; the whole table is slow."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def spanning(cases: Sequence[tuple[Any, ...]], values: Sequence[Any], cheap: Iterable[int] = ()) -> list[Any]:
    """Parameters (*case, value) of all pairs; by default each case has one value, taken in turn, and each value a case.

    Those whose numbers are in `cheap` have all values.
    """
    cheap, made, turn = set(cheap), [], 0
    for number, case in enumerate(cases):
        chosen = set(range(len(values))) if number in cheap else {turn % len(values)}
        turn += number not in cheap
        made += [
            pytest.param(*case, value, marks=() if index in chosen else pytest.mark.slow)
            for index, value in enumerate(values)
        ]
    return made
