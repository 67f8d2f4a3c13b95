"""Processes: who am I, and the few collectives the stages need. One process is the same code with no-op collectives."""

from shared.parallel.world import (
    World,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_object,
    init_world,
    shutdown,
    telling_lost_contact,
)

__all__ = [
    "World",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "init_world",
    "shutdown",
    "telling_lost_contact",
]
