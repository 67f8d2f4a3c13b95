"""What the runs of a job read: stores, the order of their tokens, one stream for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.parallel import World, barrier
from shared.store import HookStatistics
from stage_train.config import BufferPlace, OnDamage, TrainSchema
from stage_train.data.blocks import windowed
from stage_train.data.outliers import drop_outliers
from stage_train.data.stores import FrozenStore, combined_statistics
from stage_train.data.stream import StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.sample import sample_tokens
from stage_train.step.layouts import Replicated

# Tokens that the initialisation looks at.
SAMPLE_TOKENS = 8192


def order_of(cfg: TrainSchema) -> StreamOrder:
    """The order that a configuration asks for."""
    return StreamOrder(
        batch_size=cfg.stream.batch_size,
        seed=cfg.seed if cfg.stream.seed is None else cfg.stream.seed,
        lanes=cfg.stream.lanes,
        mix_contexts=cfg.stream.mix_contexts,
        drop_last=cfg.stream.drop_last,
    )


class Feed:
    """The activations of some hooks as the groups ``store`` and ``stream`` of a configuration describe them."""

    def __init__(
        self,
        cfg: TrainSchema,
        world: World,
        stores: Sequence[FrozenStore],
        hooks: Sequence[str],
        *,
        claim: tuple[str, str],
        stream: Mapping[str, Any] | None,
    ) -> None:
        """Claims a windowed store for `claim` (run id, folder), which continues from the state `stream`.

        Raises GranaryError for what can't be read, or not in this way.
        """
        self.cfg, self.world, self.stores = cfg, world, list(stores)
        self.hooks = {
            hook: (self.stores[0].store.plan.hooks[hook], self.stores[0].store.read_dtype)
            for hook in dict.fromkeys(hooks)
        }
        """d_model and the dtype that is read, of every hook."""
        self.skip_damaged = cfg.stream.on_damage is OnDamage.skip
        self.window = windowed(self.stores, cfg.stream.max_norm_multiple)
        if self.window is not None:
            if world.is_main:
                self.window.begin(*claim, stream)
            barrier()
            self.window.wait(0)
        self.data = TrainingData([part.source for part in self.stores], self.window)
        self._statistics = self._measure()
        self.order = order_of(cfg)
        self._samples: dict[tuple[str, int], Tensor] = {}

    def statistics(self, hook: str) -> HookStatistics:
        """Of the tokens that training reads."""
        return self._statistics[hook]

    def sample(self, hook: str, seed: int) -> Tensor:
        """A few thousand of the hook's activations, float32 [n, d_model]; read once, kept until `forget_samples`."""
        if (hook, seed) not in self._samples:
            self._samples[hook, seed] = sample_tokens(
                self.data, hook, *self.hooks[hook], SAMPLE_TOKENS, seed, skip_damaged=self.skip_damaged
            )
        return self._samples[hook, seed]

    def forget_samples(self) -> None:
        """Free their memory, when all SAEs have their first weights."""
        self._samples.clear()

    def open_stream(self, layout: Replicated, end: tuple[int, int]) -> TokenStream:
        """The batches of this rank's share, up to (epoch, batch) `end`."""
        stream = TokenStream(
            self.data,
            self.hooks,
            self.order,
            rank=layout.stream_rank,
            world=layout.stream_world,
            device=self.world.device,
            io_threads=self.cfg.stream.io_threads,
            prefetch_bytes=int(self.cfg.stream.prefetch_gib * GIB),
            pool_device=self._pool_device(layout.stream_world),
            skip_damaged=self.skip_damaged,
        )
        stream.stop_at(*end)
        return stream

    def _measure(self) -> dict[str, HookStatistics]:
        """Of every hook; leaves out the outliers first where that is asked for."""
        multiple, found = self.cfg.stream.max_norm_multiple, {}
        if multiple is not None and not multiple > 0:
            raise GranaryError(f"stream.max_norm_multiple={multiple}: it must be above 0, or null")
        if multiple is not None and len(self.hooks) > 1:
            raise GranaryError(
                f"stream.max_norm_multiple={multiple} drops other tokens at {' and at '.join(self.hooks)}: train these "
                "hooks one after the other, or set it to null"
            )
        for hook in self.hooks:
            parts = [part.store.statistics(hook, part.measured_shards) for part in self.stores]
            if multiple is not None:
                bound = multiple * combined_statistics(self.stores, parts).median_norm
                parts = drop_outliers(
                    self.data, self.stores, hook, parts, bound, self.world, skip_damaged=self.skip_damaged
                )
            found[hook] = combined_statistics(self.stores, parts)
        return found

    def _pool_device(self, stream_world: int) -> torch.device:
        """Where contexts are mixed: on the GPU where it is asked for, or where they fit easily."""
        place, device = self.cfg.stream.buffer, self.world.device
        if place is BufferPlace.device and device.type != "cuda":
            raise GranaryError(f"stream.buffer=device needs a GPU, the device is {device.type}: use auto or host")
        if device.type != "cuda" or place is BufferPlace.host:
            return torch.device("cpu")
        context_bytes = self.data.seq_len * sum(width * dtype.itemsize for width, dtype in self.hooks.values())
        most = context_bytes * self.order.lanes * self.order.mix_contexts // stream_world
        most += int(self.cfg.stream.prefetch_gib * GIB) // stream_world
        free, _ = torch.cuda.mem_get_info(device)
        return device if place is BufferPlace.device or most <= free // 4 else torch.device("cpu")
