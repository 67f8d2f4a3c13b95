"""Train on some kinds of tokens alone (``stream.kinds``): text, regions of images, what the assistant said.

The other positions are taken out of the masks, so the order stays a pure function of what is left; statistics are
measured anew, since a store has them over all trainable positions together.

Shape letters: T positions, D width, n rows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.basics.config import TokenKind
from shared.basics.errors import GranaryError
from shared.store import HookStatistics
from stage_train.data.stores import PinnedStore
from stage_train.data.stream import TrainingData
from stage_train.data.stream.slices import CONTEXT_BLOCK

MEASURED_CONTEXTS = 1024


def restrict_kinds(data: TrainingData, stores: Sequence[PinnedStore], kinds: Sequence[TokenKind] | None) -> None:
    """Drop the positions of `data`, which is of `stores`, that are of none of `kinds`; None keeps all.

    Raises GranaryError for a store of text alone, one that marks no assistant, and where nothing is left.
    """
    if kinds is None:
        return
    if data.blocks is not None:
        raise GranaryError("stream.kinds needs statistics of the whole store, and store.window has only a part of it")
    names = [kind.value for kind in kinds]
    if not names or len(set(names)) < len(names):
        raise GranaryError(f"stream.kinds={names}: name one or more, each once")
    data.restrict(
        np.concatenate(
            [
                np.packbits(part.store.pictures.chosen(contexts[start : start + CONTEXT_BLOCK], names), axis=1)
                for part in stores
                for contexts in [part.slice.contexts]
                for start in range(0, len(contexts), CONTEXT_BLOCK)
            ]
        ),
        "stream.kinds",
    )


def kind_statistics(part: PinnedStore, kinds: Sequence[TokenKind], site: str) -> HookStatistics:
    """Statistics of the tokens of `kinds` in a store, measured on at most `MEASURED_CONTEXTS` of its contexts."""
    contexts, names = part.slice.contexts, [kind.value for kind in kinds]
    chosen_CT = part.store.mask(contexts) & part.store.pictures.chosen(contexts, names)
    filled = np.flatnonzero(chosen_CT.any(1))
    if not filled.size:
        raise GranaryError(f"stream.kinds={names} leaves no token of {part.store.url} to train on")
    number = min(len(filled), MEASURED_CONTEXTS)
    measured = filled[np.arange(number) * len(filled) // number]
    count, mean_D, m2_D = 0, np.zeros(part.store.width(site)), np.zeros(part.store.width(site))
    norms: list[NDArray[np.float64]] = []
    for row in measured.tolist():
        x_TD = part.store.read_context(site, int(contexts[row])).double().numpy()
        x_nD = x_TD[chosen_CT[row]]
        n, own_D = len(x_nD), x_nD.mean(0)
        m2_D += ((x_nD - own_D) ** 2).sum(0) + (own_D - mean_D) ** 2 * (count * n / (count + n))
        mean_D += (own_D - mean_D) * (n / (count + n))
        count += n
        norms.append(np.linalg.norm(x_nD, axis=1))
    norm_n = np.concatenate(norms)
    return HookStatistics(
        count=int(chosen_CT.sum()),
        mean=mean_D,
        var=m2_D / count,
        mean_norm=float(norm_n.mean()),
        rms_norm=float(np.sqrt((norm_n**2).mean())),
        median_norm=float(np.median(norm_n)),
        max_norm=float(norm_n.max()),
        relative_squared_error=0.0,
    )
