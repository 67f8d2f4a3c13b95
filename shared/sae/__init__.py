"""The sparse autoencoder: config, model, losses, optimiser, checkpoint."""

from shared.sae.config import SAEConfig
from shared.sae.folder import load_config, load_provenance
from shared.sae.latents import SAELosses, SAEOutput, SparseLatents
from shared.sae.learn.dead import DeadLatents
from shared.sae.optim.base import SAEAdam
from shared.sae.variants.sae import SAE

__all__ = [
    "SAE",
    "DeadLatents",
    "SAEAdam",
    "SAEConfig",
    "SAELosses",
    "SAEOutput",
    "SparseLatents",
    "load_config",
    "load_provenance",
]
