"""What the planned run reads: a store, or what stands for one that is not there yet."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.parallel import World
from shared.sae.sites import Sites
from shared.store.format.dtypes import row_bytes, storage_type
from stage_train.config import TrainSchema
from stage_train.data.inputs import SAMPLE_TOKENS, order_of
from stage_train.data.sites import resolve_sites, site_formats
from stage_train.data.stores import pin, urls_of
from stage_train.data.stream import StoreSlice, TrainingData
from stage_train.data.stream.length import StreamLength, stream_length
from stage_train.data.stream.sample import SAMPLE_CONTEXTS
from stage_train.estimate.config import PlanSchema


@dataclass(frozen=True)
class Data:
    """Where a run reads, and what lies there; gives to a run's start what ``TrainingInputs`` gives."""

    sites: Sites
    formats: Mapping[str, tuple[int, torch.dtype]]
    """Width, and the type that is read, of every site."""
    dtype: str
    """As stored."""
    tokens: TrainingData
    length: StreamLength

    @property
    def tokens_per_context(self) -> float:
        """Trainable ones, on average."""
        return self.tokens.num_tokens / int(np.count_nonzero(self.tokens.counts))

    @property
    def bytes_per_token(self) -> float:
        """Read from the store for each trainable token: contexts are read whole."""
        row = sum(row_bytes(self.dtype, width) for width, _ in self.formats.values())
        return row * self.tokens.seq_len / self.tokens_per_context

    def at(self, sites: Sites) -> Self:
        """The same with some of its sites."""
        return replace(self, sites=sites, formats={name: self.formats[name] for name in sites.names})

    def rows(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Random activations [count, width] of every site."""
        return {site: torch.randn(count, width, device=device) for site, (width, _) in self.formats.items()}

    def sample(self, sites: Sites, seed: int) -> tuple[Tensor, Tensor]:
        """x and y, as many as the start looks at."""
        contexts = min(SAMPLE_CONTEXTS, self.tokens.num_contexts)
        rows = min(SAMPLE_TOKENS, round(contexts * self.tokens_per_context))
        return sites.pick(self.rows(rows, torch.device("cpu")))

    def statistics(self, site: str) -> SimpleNamespace:
        """Any."""
        ones = torch.ones(self.formats[site][0])
        return SimpleNamespace(mean=ones, var=ones, mean_norm=1.0)


@dataclass(frozen=True)
class NoStore:
    """Stands for a store: every position of its contexts is trained on."""

    seq_len: int

    def mask(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """All true."""
        return np.ones((len(contexts), self.seq_len), np.bool_)

    def read_context(self, hook: str, context: int, out: Tensor | None = None) -> Tensor:
        """Nothing to read."""
        raise NotImplementedError


def find_data(cfg: TrainSchema, options: PlanSchema) -> Data:
    """From the store of the configuration, or from d_model and seq_len, the same width at every site."""
    order, tokens, epochs = order_of(cfg), cfg.schedule.tokens, cfg.schedule.epochs
    if options.d_model is None:
        try:
            stores = pin(urls_of(cfg), World(0, 1, 0, torch.device("cpu")), named_urls(cfg.store.beside))
        except GranaryError as error:
            raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error
        sites, data = resolve_sites(cfg, stores), TrainingData([part.slice for part in stores])
        length = stream_length(data, order, tokens=tokens, epochs=epochs)
        return Data(sites, site_formats(sites.names, stores), stores[0].store.plan.dtype, data, length)
    if tokens is None or tokens <= 0 or epochs is not None:
        raise GranaryError(
            f"schedule.tokens={tokens}, schedule.epochs={epochs}: without a store nobody knows how long an epoch is: "
            "give tokens above 0, and set epochs to null"
        )
    reads = _names(cfg.reads if cfg.hook is None else cfg.hook) or ("planned",)
    sites, steps = Sites(reads, _names(cfg.writes) or reads), math.ceil(tokens / order.batch_size)
    contexts = np.arange(order.lanes * order.mix_contexts)  # more are not in memory at a time
    return Data(
        sites,
        dict.fromkeys(sites.names, (options.d_model, storage_type(options.store_dtype).read)),
        options.store_dtype,
        TrainingData([StoreSlice(NoStore(options.seq_len), contexts)]),
        StreamLength(steps, steps * order.batch_size, (0, steps)),
    )


def _names(value: object) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
