"""Small stores of made-up activations, for tests and benchmarks of whatever reads a store.

Shapes: S contexts, T positions, D = d_model.
"""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.store.format.layout import StorePlan
from shared.store.store import Store


def synthetic_plan(num_contexts: int = 10, seq_len: int = 64, d_model: int = 130, **changes: Any) -> StorePlan:
    """A plan for a store of one hook, any field of which may be changed."""
    fields: dict[str, Any] = {
        "num_contexts": num_contexts,
        "seq_len": seq_len,
        "hooks": {"layers.2.resid_post": d_model},
        "dtype": "bfloat16",
        "shard_contexts": 4,
        "chunk_tokens": 16,
        "codec": "none",
        "heldout_fraction": 0.2,
        "heldout_placement": "last",
        "provenance": {"model": {"id": "synthetic"}, "corpus": {"description": "synthetic"}},
        "versions": {},
    }
    return StorePlan(**{**fields, **changes})


def synthetic_tokens(plan: StorePlan, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Tokens, mask (about 1 in 10 positions masked out) and segments, each [S, T]."""
    generator = np.random.default_rng(seed)
    shape = (plan.num_contexts, plan.seq_len)
    tokens = generator.integers(0, 50_000, shape, dtype=np.int32)
    segments = np.sort(generator.integers(0, 3, shape, dtype=np.int32), axis=1)
    return tokens, generator.random(shape) > 0.1, segments


def synthetic_context(plan: StorePlan, hook: str, context: int, seed: int = 0) -> torch.Tensor:
    """Residual-like float32 activations [T, D] of one context: a pure function of seed, hook and context.

    Two dimensions are huge and the first position's norm is far above the others, as in LLaMA.
    """
    number = list(plan.hooks).index(hook)
    generator = np.random.default_rng([seed, number, context])
    D = plan.hooks[hook]
    x_TD = generator.standard_normal((plan.seq_len, D), dtype=np.float32)
    x_TD *= np.exp(0.5 * np.sin(np.arange(D, dtype=np.float32)))
    x_TD[:, D // 3] *= 40
    x_TD[0, D // 2] = 300
    return torch.from_numpy(x_TD)


def synthetic_shard(store: Store, shard: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 activations [n, T, D] of every hook for one shard."""
    plan = store.plan
    contexts = store.shard_contexts(shard)
    return {hook: torch.stack([synthetic_context(plan, hook, c, seed) for c in contexts]) for hook in plan.hooks}


def synthetic_store(url: str | os.PathLike[str], plan: StorePlan, seed: int = 0, finalize: bool = True) -> Store:
    """Create a store at `url` and fill every shard that is not committed yet."""
    store = Store.create(url, plan, *synthetic_tokens(plan, seed))
    for shard in store.pending():
        store.write_shard(shard, synthetic_shard(store, shard, seed))
    if finalize:
        store.finalize()
    return store
