"""From the configuration to a layout."""

from shared.parallel import World
from stage_train.config import LayoutKind, ParallelSchema
from stage_train.step.layouts.base import Layout
from stage_train.step.layouts.data_parallel import DataParallel
from stage_train.step.layouts.split import latent_parts


def make_layout(cfg: ParallelSchema, world: World) -> Layout:
    """One process is always the plain layout. Raises GranaryError when the ranks do not fit the layout."""
    parts = latent_parts(cfg, world.size)
    if world.size == 1:
        return DataParallel(world)
    # Imported where chosen: FSDP takes a second or two.
    if cfg.layout is LayoutKind.fsdp:
        from stage_train.step.layouts.fsdp import FullySharded

        return FullySharded(world)
    if cfg.layout is LayoutKind.latent:
        from stage_train.step.layouts.latent import LatentParallel

        return LatentParallel(world, parts)
    if cfg.layout is LayoutKind.layers:
        from stage_train.step.layouts.layers import LayerParallel

        return LayerParallel(world, parts)
    return DataParallel(world)
