"""Permutations that are pure functions of integers, the same on every machine and with every numpy.

numpy promises stable bit streams for its bit generators and for SeedSequence, not for ``Generator.permutation``; hence
a permutation here is the stable argsort of raw 64-bit draws.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from shared.basics.errors import GranaryError


class Purpose(IntEnum):
    """What a permutation is for; the first word of its key, so that no two purposes share random numbers."""

    CONTEXTS = 1
    TOKENS = 2
    SUBSET = 3
    SAMPLE = 4
    BUFFER = 5


def random_order(n: int, purpose: Purpose, seed: int, epoch: int, *detail: int) -> NDArray[np.int64]:
    """A uniformly random permutation of ``range(n)``, a pure function of the arguments.

    `detail` is up to two further words (a lane and a group, or a source). All words must be >= 0.
    """
    # Fixed length: SeedSequence pads with zeros, so keys of different lengths could collide.
    key = [int(purpose), seed, epoch, *detail, *([0] * (2 - len(detail)))]
    draws = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(draws, kind="stable")


def effective_lanes(lanes: int, num_contexts: int) -> int:
    """`lanes`, halved until no lane is left without a context.

    A pure function of the configured lanes and the store, never of the number of processes. 64 lanes over 20 contexts
    are 16 lanes.
    """
    if lanes < 1:
        raise GranaryError(f"stream.lanes={lanes}: at least one lane is needed")
    while lanes > max(num_contexts, 1):
        lanes //= 2
    return lanes


def lanes_per_rank(lanes: int, num_contexts: int, world: int) -> tuple[int, int]:
    """``effective_lanes``, and how many of them each rank owns. Raises GranaryError when they do not divide."""
    effective = effective_lanes(lanes, num_contexts)
    if effective % world:
        halved = f" (halved from {lanes} for {num_contexts} contexts)" if effective != lanes else ""
        raise GranaryError(
            f"stream.lanes: {effective} lanes{halved} do not divide among {world} processes: choose a multiple"
        )
    return effective, effective // world


def group_starts(num_contexts: int, lane: int, mix_contexts: int) -> NDArray[np.int64]:
    """Where each group of a lane's contexts begins, with the end as the last entry: int64 [groups + 1].

    Groups have `mix_contexts` contexts, but a lane's first one has ``1 + lane % mix_contexts``: otherwise all lanes
    would run out, and read again, at the same moment.
    """
    first = min(1 + lane % mix_contexts, num_contexts)
    starts = np.arange(first, num_contexts, mix_contexts, dtype=np.int64)
    return np.concatenate([[0], starts, [num_contexts]]).astype(np.int64)
