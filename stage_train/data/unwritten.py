"""What stands for a store that nobody has written yet: its sites, widths and positions, as far as a plan asks."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.parallel import World
from shared.sae.contexts import Given
from shared.sae.sites import Sites
from shared.store.format.dtypes import storage_type
from stage_train.config import TrainSchema
from stage_train.data.inputs import SAMPLE_TOKENS
from stage_train.data.stores import PinnedStore, pin, urls_of
from stage_train.data.stream import TrainingData
from stage_train.data.stream.batch import AnyBatch, whole_batch
from stage_train.data.stream.sample import SAMPLE_CONTEXTS, Formats

# Epochs that a run is taken for at most, of contexts as they will be.
EPOCHS = 1000


def stores_of(
    cfg: TrainSchema, d_model: int | None, *, seq_len: int, dtype: str, layers: int | None
) -> list[PinnedStore]:
    """The stores that `cfg` names, opened, or, where `d_model` is given, what stands for one.

    Raises GranaryError as opening them does, or as `unwritten_store`.
    """
    if d_model is not None:
        return [unwritten_store(cfg, d_model=d_model, seq_len=seq_len, dtype=dtype, layers=layers)]
    try:
        return pin(urls_of(cfg), World(0, 1, 0, torch.device("cpu")), named_urls(cfg.store.beside))
    except GranaryError as error:
        raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error


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


class UnreadInputs:
    """What stands for batches and the sample of such a store: random rows, statistics of one."""

    def __init__(self, own: Formats, every: Formats, *, unit: str, tokens: TrainingData) -> None:
        """Rows of the sites `own`, statistics of `every`; documents are as long as a context where that is the unit."""
        self._own, self._every, self._T = own, every, None if unit == "token" else tokens.seq_len
        self._sample = min(SAMPLE_TOKENS, (tokens.num_contexts if self._T else SAMPLE_CONTEXTS) * tokens.seq_len)

    def draw(self, count: int, device: torch.device, *, num_tokens: int) -> AnyBatch:
        """`count` rows of a batch of `num_tokens`, or contexts, one document each, of as many positions."""
        shape = (count,) if self._T is None else (max(1, count // self._T), self._T)
        rows = {name: torch.randn(*shape, width, device=device) for name, (width, _) in self._own.items()}
        return whole_batch(rows, num_tokens=num_tokens)

    def sample(self, sites: Sites, seed: int) -> tuple[Given, torch.Tensor]:
        """What is read and what must be written of the sample that a dictionary starts from, on the CPU."""
        return self.draw(self._sample, torch.device("cpu"), num_tokens=self._sample).parts(sites, None)[0]

    def statistics(self, site: str) -> SimpleNamespace:
        """Mean, variance and mean norm of one."""
        ones = torch.ones(self._every[site][0])
        return SimpleNamespace(mean=ones, var=ones, mean_norm=1.0)
