"""The activation store: the only code that knows Zarr. See docs/store.md for the format."""

from shared.store.capacity import bytes_planned, free_bytes
from shared.store.format.layout import FORMAT_VERSION, StorePlan
from shared.store.format.manifest import DamagedObjectError, ShardRecord
from shared.store.io.base import ObjectMissingError
from shared.store.statistics import HookStatistics
from shared.store.store import Store
from shared.store.window import Window, WindowPlan

__all__ = [
    "FORMAT_VERSION",
    "DamagedObjectError",
    "HookStatistics",
    "ObjectMissingError",
    "ShardRecord",
    "Store",
    "StorePlan",
    "Window",
    "WindowPlan",
    "bytes_planned",
    "free_bytes",
]
