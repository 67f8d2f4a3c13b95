"""Which share of the latents a rank has under each layout, before any process group is there."""

from shared.basics.errors import GranaryError
from stage_train.config import LayoutKind, ParallelSchema


def latent_parts(cfg: ParallelSchema, world: int) -> int:
    """Parts into which the latents are split for computing, under ``layers`` those of a layer; 1 for other layouts.

    Raises GranaryError when the processes do not divide among them.
    """
    may_split = cfg.layout in (LayoutKind.latent, LayoutKind.layers)
    if cfg.latent is not None and not may_split:
        raise GranaryError(
            f"parallel.latent={cfg.latent} belongs to parallel=latent and layers, the layout is {cfg.layout.value}"
        )
    if world == 1 or not may_split:
        return 1
    every = world if cfg.layout is LayoutKind.latent else 1
    parts = every if cfg.latent is None else cfg.latent
    if parts < 1 or world % parts:
        raise GranaryError(f"parallel.latent={parts} does not divide the {world} processes")
    return parts


def latents_of_part(d_latent: int, parts: int) -> int:
    """Latents of each part under ``latent``. Raises GranaryError when they do not divide."""
    if d_latent % parts:
        raise GranaryError(f"{d_latent} latents do not divide among parallel.latent={parts}: change sae.expansion")
    return d_latent // parts


def latents_of_shard(d_latent: int, world: int) -> int:
    """Latents whose rows each rank keeps under ``fsdp``. Raises GranaryError when they do not divide."""
    if d_latent % world:
        raise GranaryError(
            f"{d_latent} latents do not divide among {world} processes: change sae.expansion, or use parallel=ddp"
        )
    return d_latent // world
