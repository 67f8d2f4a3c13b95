"""The sparse autoencoder: config, model, losses, optimiser, checkpoint."""

from shared.sae.checkpoint import load_config, load_provenance
from shared.sae.config import SAEConfig
from shared.sae.dead import DeadLatents
from shared.sae.latents import SAELosses, SAEOutput, SparseLatents
from shared.sae.model import SAE
from shared.sae.optim import SAEAdam
from shared.sae.schema import SAESchema

__all__ = [
    "SAE",
    "DeadLatents",
    "SAEAdam",
    "SAEConfig",
    "SAELosses",
    "SAEOutput",
    "SAESchema",
    "SparseLatents",
    "load_config",
    "load_provenance",
]
