"""Schemas of the config groups that more than one stage uses.

Fields have types and meanings here and values in ``conf/``: a schema that also held defaults would be a second place
to look. Stage schemas are in ``stage_*/config.py``; the SAE's own configuration, which lives in checkpoints, is
``shared.sae.SAEConfig``.
"""

from dataclasses import dataclass
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class ModelDtype(Enum):
    """Precision of the language model's weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True)
class ModelSchema:
    """Group ``model``: which language model."""

    path: str = MISSING
    """Local folder in Hugging Face form, a hub id, or ``bundled``."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: ModelDtype = MISSING
    """Precision of weights and arithmetic; the store's dtype is separate."""
    quantisation: str | None = None
    """Of the weights, as they are loaded: bnb_int8, bnb_nf4, torchao_int8; null: none."""
    probe: bool = True
    """Before a harvest of isolated documents, compare some of them packed and alone; false trusts the model."""
    attn_implementation: str = MISSING
    """Attention kernel as transformers names it: sdpa, eager, flash_attention_2, flex_attention."""


@dataclass(kw_only=True)
class DeviceSchema:
    """Group ``device``: where tensors live."""

    name: str = MISSING
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda``."""
    threads: int | None = None
    """CPU threads for torch; null leaves torch's choice."""


def register() -> None:
    """Put the shared group schemas into Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(group="model", name="schema", node=ModelSchema)
    store.store(group="device", name="schema", node=DeviceSchema)
