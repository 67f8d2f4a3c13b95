"""Data parallel (ddp): every rank holds the whole dictionary and reads its share of each batch. Also a world of one."""

from stage_train.step.layouts.base import Layout


class DataParallel(Layout):
    """The layout of ``parallel=ddp``: gradients are summed over all ranks, once per step."""
