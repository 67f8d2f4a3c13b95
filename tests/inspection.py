"""Small inspections for tests: a store, a dictionary beside it, and the stage run in this process.

Shapes: S contexts, T positions, D width, F latents.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from shared.launch.schema import fill
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from stage_inspect.config import InspectSchema, register
from tests.composing import composed
from tests.synthetic import synthetic_plan, synthetic_store

HOOK = "layers.2.resid_post"
WIDTH, LATENTS = 24, 40


def small_store(folder: Path, num_contexts: int = 21, seq_len: int = 64, **changes: Any) -> Store:
    """Seven shards of three contexts, one of them held out; two or three documents in each context."""
    fields = {"num_contexts": num_contexts, "seq_len": seq_len, "shard_contexts": 3, "heldout_fraction": 0.15}
    return synthetic_store(folder, synthetic_plan(**{**fields, "d_model": WIDTH, **changes}))


def small_sae(folder: Path, activation: str = "topk", *, seed: int = 0, **changes: Any) -> SAE:
    """A random SAE of `LATENTS` latents, of which number 3 never fires."""
    generator = torch.Generator().manual_seed(seed)
    fields = {"d_latent": LATENTS, "normalisation": "none", "k": 5 if "topk" in activation else None}
    config = SAEConfig(d_model=WIDTH, activation=activation, sites=Sites.of(HOOK), **{**fields, **changes})
    sae = SAE(config, generator=generator)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3, generator=generator)
        sae.b_enc[3] = -1e6
        if activation == "batchtopk":
            sae.activation.threshold.fill_(2.0)
        if activation == "jumprelu":
            sae.activation.log_threshold.fill_(0.5)
        if activation == "gated":
            sae.activation.r_mag.normal_(std=0.2, generator=generator)
            sae.activation.b_mag.normal_(std=0.2, generator=generator)
    sae.save_pretrained(folder)
    return sae


registered = cache(register)


def inspect_config(folder: Path, **changes: Any) -> InspectSchema:
    """The configuration of an inspection of ``folder``/store and ``folder``/sae, with small numbers."""
    keys = {
        "run_dir": folder, "logits": "false", "device.name": "cpu", "latents.window": 16, "latents.top": 7,
        "latents.sample": 9, "latents.token_sample": 11, "latents.together_tokens": 400, "latents.pool": 12, **changes,
    }  # fmt: skip
    registered()
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        cfg = composed("inspect", [f"{key}={value}" for key, value in keys.items()])
    GlobalHydra.instance().clear()
    filled: InspectSchema = fill(cfg)
    return filled


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a latents folder; what meta.json says of places and versions is the same in one test."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal, bit for bit, where they are of one type."""
    return one.shape == other.shape and np.array_equal(one, other)
