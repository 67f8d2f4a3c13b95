"""Pairs (token, latent) of a batch sorted by latent and place, and groups of neighbours among them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.layout import BINS, BINS_PER_OCTAVE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Mantissas (of 23 bits) at which the second and the third bin of an octave begin.
_THIRDS = tuple(round((2 ** (part / BINS_PER_OCTAVE) - 1) * 2**23) for part in (1, 2))


@dataclass(frozen=True)
class Pairs:
    """Firing latents of a batch; ascending by latent, then by place."""

    latent: Ints
    at: Ints
    """Flat position in the batch."""
    value: Floats

    @classmethod
    def of(cls, at_N: Ints, indices_NK: Ints, values_NK: Floats, num_latents: int) -> "Pairs":
        """Make them from sparse latents of the flat positions `at_N`, ascending; index -1 is padding."""
        fired = indices_NK >= 0
        latent = indices_NK[fired]
        order = stable_order(latent, num_latents)
        at = np.repeat(at_N, fired.sum(1))
        return cls(latent[order], at[order], values_NK[fired][order])


def stable_order(keys: Ints, limit: int) -> npt.NDArray[np.intp]:
    """The order that sorts keys in [0, limit), equal ones as they come: by radix, 16 bits at a time."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if limit > 1 << 16:
        high = (keys >> 16).astype(np.uint16)
        order = order[np.argsort(high[order], kind="stable")]
    return order


def starts_of(*columns: Ints) -> Ints:
    """First index of each run of rows that are equal in all columns."""
    change = np.zeros(len(columns[0]), bool)
    change[:1] = True
    for column in columns:
        change[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(change)


def lengths(starts: Ints, total: int) -> Ints:
    """Length of each run."""
    return np.diff(starts, append=total)


def peaks(value: Floats, starts: Ints) -> Ints:
    """Index of the first of the largest values of each run."""
    if not len(starts):
        return starts
    run = np.repeat(np.arange(len(starts)), lengths(starts, len(value)))
    hits = np.flatnonzero(value == np.maximum.reduceat(value, starts)[run])
    return hits[np.flatnonzero(np.diff(run[hits], prepend=-1))]


def bins(value: Floats, origin: int) -> Ints:
    """Bin of the histogram of each value: by its exponent and mantissa, so no logarithm is rounded.

    Bin 0 holds what is below 2^origin, 0 and negative values too; each octave above has three bins.
    """
    bits = np.ascontiguousarray(value).view(np.int32).astype(np.int64)
    mantissa = bits & 0x7FFFFF
    found = BINS_PER_OCTAVE * ((bits >> 23) - 127 - origin) + 1
    found += (mantissa >= _THIRDS[0]).astype(np.int64) + (mantissa >= _THIRDS[1])
    clipped: Ints = np.clip(np.where(bits < 0, 0, found), 0, BINS - 1)
    return clipped


def falling(value: Floats) -> npt.NDArray[np.uint32]:
    """Keys that are the smaller, the larger the float: its bits, turned round."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    return np.where(bits >> 31 == 0, ~(bits | np.uint32(1 << 31)), bits)


def ragged(first: Ints, count: Ints) -> Ints:
    """first[0], first[0] + 1 ... (count[0] of them), first[1] ..."""
    ends = np.cumsum(count)
    found: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
    return found
