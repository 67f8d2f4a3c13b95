"""The first weights of a run from an SAE on disk: ``init_from``."""

from shared.basics.errors import GranaryError
from shared.sae import SAE

# What must be alike, or the weights would mean something else.
ALIKE = ("d_model", "d_latent", "activation", "normalisation", "pre_bias", "shift_back", "unit_norm_decoder")


def copy_weights(sae: SAE, folder: str) -> None:
    """Fill weights, thresholds and normalisation of `sae` with those of a folder or hub id, of any format that loads.

    Raises GranaryError naming what is not alike.
    """
    source = SAE.from_pretrained(folder)
    unlike = [
        f"{name} is {getattr(source.config, name)} there, {getattr(sae.config, name)} here"
        for name in ALIKE
        if getattr(source.config, name) != getattr(sae.config, name)
    ]
    if unlike:
        raise GranaryError(f"init_from={folder} is another SAE: {'; '.join(unlike)}; give sae.* as they are there")
    sae.load_state_dict(source.state_dict())
