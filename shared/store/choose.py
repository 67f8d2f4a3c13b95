"""Which contexts of a store a stage works on."""

import numpy as np
import numpy.typing as npt

from shared.basics.config import Split
from shared.basics.errors import GranaryError
from shared.store.store import Store


def choose_contexts(store: Store, split: Split, limit: int | None) -> npt.NDArray[np.int64]:
    """Committed contexts of the split, or `limit` of them at even distances; raises GranaryError where it has none."""
    contexts = store.contexts(split.value)
    if not len(contexts):
        if split is Split.heldout and not store.heldout_shards:
            raise GranaryError(
                f"the store at {store.url} holds nothing out: harvest with store.heldout_fraction above 0,"
                " or work on training data with split=train"
            )
        raise GranaryError(f"no {split.value} shard of {store.url} is written yet: finish the harvest first")
    if limit is not None and limit < 1:
        raise GranaryError(f"contexts={limit}: at least one, or null for all")
    if limit is None or limit >= len(contexts):
        return contexts
    return contexts.take(np.arange(limit) * len(contexts) // limit)
