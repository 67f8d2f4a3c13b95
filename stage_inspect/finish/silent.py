"""The pool of windows that all latents share, and where in it each one fires: elsewhere it is silent, as was seen."""

import numpy as np
import numpy.typing as npt

from stage_inspect.scan.log import Columns
from stage_inspect.scan.pairs import Ints
from stage_inspect.scan.state import POOL, Chance

Unsigned = npt.NDArray[np.unsignedinteger]


def choose_pool(candidates: Ints, size: int, chance: Chance) -> Ints:
    """Places of the windows of the smallest hashes, ascending."""
    key = chance.place(POOL, candidates)
    return np.sort(candidates[np.lexsort((candidates, key))[:size]])


def silent_columns(window: Unsigned, latent: Unsigned, pool: Ints, num_latents: int) -> Columns:
    """Where each latent fired in the pool, from all pairs (window, latent) in which one did."""
    at = np.searchsorted(pool.astype(window.dtype), window)
    inside = np.flatnonzero(at < len(pool))
    inside = inside[pool[at[inside]] == window[inside]]
    pairs = np.unique(latent[inside].astype(np.int64) * (len(pool) or 1) + at[inside])
    counts = np.bincount(pairs // (len(pool) or 1), minlength=num_latents)
    return {
        "silent/offsets": np.append(0, np.cumsum(counts)),
        "silent/fired": (pairs % (len(pool) or 1)).astype(np.uint16),
    }
