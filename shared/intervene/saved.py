"""An SAE with what is known of its training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.sae.variants import SAE


@dataclass(frozen=True)
class Saved:
    """An SAE with what its folder says beside."""

    sae: SAE
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
