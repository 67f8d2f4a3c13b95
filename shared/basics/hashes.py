"""Chance that is a pure function: of a seed and a place in the store, so that no order and no process changes it."""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(x: U64) -> U64:
    """splitmix64 of each number (Steele, Lea and Flood 2014), a bijection whose bits all depend on all."""
    with np.errstate(over="ignore"):
        x = x + _STEP
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
        return x ^ (x >> np.uint64(31))


def seeded(seed: int, purpose: int, numbers: npt.NDArray[np.integer]) -> U64:
    """A random number for each of `numbers`; another one for each `purpose`."""
    start = mix(np.array([(seed * 1_000_003 + purpose) % 2**64], np.uint64))[0]
    return mix(numbers.astype(np.uint64) ^ start)


def limit(share: float) -> np.uint64:
    """The number below which a `share` of all hashes lies."""
    return np.uint64(min(2**64 - 1, int(share * 2.0**64)))
