"""The sparse autoencoder: it reads one site and gives it back.

    x~ = normalise(x);  z = W_enc (x~ - b_dec) + b_enc;  f = activation(z)
    x^ = denormalise(sum_i f_i W_dec[i] + b_dec)

W_enc and W_dec are both [F, D], one row per latent; the rows of W_dec have unit norm unless the config frees it.
"""

from typing import ClassVar

from shared.sae.config import DictionaryConfig, SAEConfig
from shared.sae.variants.one_group import OneGroup


class SAE(OneGroup):
    """A sparse autoencoder as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = SAEConfig
    config: SAEConfig
