"""Shuffling a stream within bounded memory, as a function of the seed alone."""

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def windowed_shuffle(items: Iterable[T], window: int, rng: random.Random) -> Iterator[T]:
    """Yield `items` in random order, holding at most `window` of them: each step gives out one held item at random."""
    held: list[T] = []
    for item in items:
        if len(held) < window:
            held.append(item)
            continue
        place = rng.randrange(window)
        held[place], item = item, held[place]
        yield item
    rng.shuffle(held)
    yield from held
