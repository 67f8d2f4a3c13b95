"""The part of one rank of a group that is not there: what it holds and computes, without the others' processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed._tools import fake_collectives  # noqa: F401 (messages of tensors without memory)
from torch.testing._internal.distributed.fake_pg import FakeStore

from shared.parallel import World
from stage_train.config import ParallelSchema
from stage_train.step.layouts.base import Layout
from stage_train.step.layouts.make import make_layout


@contextmanager
def unconnected(parallel: ParallelSchema, ranks: int, device: torch.device) -> Iterator[Layout]:
    """Yield the layout of the first of `ranks`, whose messages go nowhere."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield make_layout(parallel, World(0, ranks, 0, device))
    finally:
        dist.destroy_process_group()
