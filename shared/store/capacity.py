"""How many bytes a plan will write, and how many the target has left."""

import os

from shared.store.format.dtypes import scales_per_row, storage_type
from shared.store.format.layout import StorePlan
from shared.store.format.shard import index_bytes
from shared.store.io.open import open_io

RECORD_BYTES_PER_CHUNK = 11  # a decimal crc32c and its comma in a commit record
RECORD_BYTES = 4096  # the rest of a commit record and its hooks' histograms


def shard_bytes(plan: StorePlan) -> int:
    """Most bytes that the activations (and scales) of one shard take; a last shard may be shorter."""
    contexts, chunks = plan.shard_contexts, plan.chunks_per_context
    total = 0
    for hook in plan.hooks:
        objects = 2 if plan.dtype == "int8" else 1
        total += contexts * (plan.context_bytes(hook) + 4 * chunks * objects) + objects * index_bytes(contexts * chunks)
    return total


def bytes_planned(plan: StorePlan) -> int:
    """Bytes a harvest of `plan` will have written; an upper bound where a codec is chosen."""
    contexts, chunks = plan.num_contexts, plan.chunks_per_context
    total = plan.num_contexts * (plan.seq_len * 9 + 3 * 4) + plan.num_shards * 3 * index_bytes(plan.shard_contexts)
    for d_model in plan.hooks.values():
        rows = [d_model * storage_type(plan.dtype).numpy.itemsize]
        if plan.dtype == "int8":
            rows.append(2 * scales_per_row(d_model))
        for row in rows:
            total += contexts * (plan.seq_len * row + 4 * chunks)
            total += plan.num_shards * index_bytes(plan.shard_contexts * chunks)
        total += plan.num_shards * (2 * 8 * d_model + 4 + RECORD_BYTES)
        total += contexts * chunks * len(rows) * RECORD_BYTES_PER_CHUNK
    return total


def free_bytes(url: str | os.PathLike[str]) -> int | None:
    """Room at a local path (which need not exist yet); None for an object store."""
    return open_io(url).free_bytes()
