"""Small stores for cross-layer transcoders: every site is another map of the same sparse codes."""

from pathlib import Path

import numpy as np
import torch

from shared.store import Store, StorePlan

LAYERS, WIDTH = 4, 12


def clt_store(folder: Path, layers: int = LAYERS, *, shards: int = 6) -> Store:
    """`layers` layers' mlp_in and mlp_out, of width 12; layer t's output depends on the codes of all up to t."""
    hooks = {f"layers.{layer}.{site}": WIDTH for layer in range(layers) for site in ("mlp_in", "mlp_out")}
    plan = StorePlan(
        num_contexts=4 * shards, seq_len=16, hooks=hooks, dtype="float32", shard_contexts=4, chunk_tokens=16,
        codec="none", heldout_fraction=0.2, heldout_placement="last", provenance={"model": {"id": "planted"}},
        versions={},
    )  # fmt: skip
    rng, shape = np.random.default_rng(0), (4 * shards, 16)
    tokens = np.zeros(shape, np.int32)
    store = Store.create(folder, plan, tokens, rng.random(shape) < 0.9, tokens)
    codes = [rng.random((*shape, 8)) * (rng.random((*shape, 8)) < 0.2) for _ in range(layers)]
    arrays = {}
    for layer in range(layers):
        read = codes[layer] @ rng.standard_normal((8, WIDTH)) + 0.05 * rng.standard_normal((*shape, WIDTH))
        written = sum(codes[source] @ rng.standard_normal((8, WIDTH)) for source in range(layer + 1))
        arrays[f"layers.{layer}.mlp_in"], arrays[f"layers.{layer}.mlp_out"] = read, written * (layer + 1)
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    for shard in store.pending():
        span = store.shard_contexts(shard)
        store.write_shard(shard, {name: whole[span.start : span.stop].contiguous() for name, whole in tensors.items()})
    return store
