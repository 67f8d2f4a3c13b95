"""Weights quantised while they are loaded, by the packages that transformers knows.

The forward still computes in the model's dtype. A model whose own config.json says how it is quantised loads without.
"""

from collections.abc import Callable
from typing import Any

from shared.basics.errors import GranaryError


def _bitsandbytes(**options: Any) -> Any:
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _torchao(name: str) -> Any:
    import accelerate  # noqa: F401
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


# Name to the package it needs and what makes transformers' configuration.
SCHEMES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb_int8": ("bitsandbytes", lambda: _bitsandbytes(load_in_8bit=True)),
    "bnb_nf4": ("bitsandbytes", lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao_int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
}


def quantisation_config(scheme: str) -> Any:
    """transformers' configuration; raises GranaryError for an unknown scheme or a package that is not installed."""
    if scheme not in SCHEMES:
        raise GranaryError(f"model.quantisation={scheme}: choose from {', '.join(SCHEMES)}, or null")
    package, make = SCHEMES[scheme]
    try:
        return make()
    except (ImportError, AttributeError) as error:
        raise GranaryError(
            f"model.quantisation={scheme} needs {package} and accelerate: pip install 'granary-sae[quantised]'"
        ) from error
