"""A run over a small store with images: a random SAE, and the latents folder that an inspection makes of both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.latents import Vocabulary
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from stage_inspect.inspect import inspect
from tests.inspection import inspect_config
from tests.pictured_store import pictured_store

LATENTS = 24


def pictured_run(folder: Path, vocabulary: Vocabulary | None = None, **changes: Any) -> Path:
    """Write ``store``, ``sae`` and ``latents``; `vocabulary` in the place of a tokenizer, which the store has not."""
    store = pictured_store(folder / "store")
    config = SAEConfig(
        d_model=12, d_latent=LATENTS, activation="topk", k=4, normalisation="none", sites=Sites.of(store.hooks[0])
    )
    SAE(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "sae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage_inspect.finish.finish.find_vocabulary", lambda job: vocabulary)
        inspect(inspect_config(folder, **changes))
    return folder
