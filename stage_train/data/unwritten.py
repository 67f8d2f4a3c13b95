"""What stands for a store that nobody has written yet: its sites, widths and positions, as far as a plan asks."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from shared.store.format.dtypes import storage_type
from stage_train.config import TrainSchema
from stage_train.data.stores import PinnedStore

# Epochs that a run is taken for at most, of contexts as they will be.
EPOCHS = 1000


def unwritten_store(cfg: TrainSchema, *, d_model: int, seq_len: int, dtype: str, layers: int | None) -> PinnedStore:
    """One shard with every site that `cfg` names, all positions trainable; ``*`` stands for `layers` layers.

    Raises GranaryError where the run's length, or what a pattern stands for, is the store's alone to say.
    """
    tokens = cfg.schedule.tokens
    if tokens is None or cfg.schedule.epochs is not None:
        raise GranaryError("without a store nobody knows how long an epoch is: give schedule.tokens, no epochs")
    sides = [[side] if isinstance(side, str) else side or [] for side in (cfg.hook, cfg.reads, cfg.writes)]
    names = [name for side in sides for name in side] or ["planned"]
    if layers is None and any("*" in name for name in names):
        raise GranaryError(f"{names[0]}: without a store nobody knows how many layers that is: give layers=...")
    contexts = max(cfg.stream.lanes * cfg.stream.mix_contexts, math.ceil(tokens / seq_len / EPOCHS))
    store: Any = SimpleNamespace(
        url="no store",
        hooks=[name.replace("*", str(layer)) for name in names for layer in range(layers or 1)],
        plan=SimpleNamespace(dtype=dtype),
        seq_len=seq_len,
        width=lambda hook: d_model,
        dtype_of=lambda hook: storage_type(dtype).read,
        shard_contexts=lambda shard: range(contexts),
        mask=lambda contexts: np.ones((len(contexts), seq_len), np.bool_),
    )
    return PinnedStore(store, 1.0, (0,))
