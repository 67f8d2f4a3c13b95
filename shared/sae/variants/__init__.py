"""Kinds of dictionary: one file for each, with its config and its module."""

from shared.sae.variants.base import Dictionary
from shared.sae.variants.clt import CLT
from shared.sae.variants.crosscoder import Crosscoder
from shared.sae.variants.lorsa import Lorsa
from shared.sae.variants.molt import MoLT
from shared.sae.variants.sae import SAE
from shared.sae.variants.skip_transcoder import SkipTranscoder
from shared.sae.variants.transcoder import Transcoder

VARIANTS: dict[str, type[Dictionary]] = {
    made.config_class.kind: made for made in (SAE, Transcoder, SkipTranscoder, Crosscoder, CLT, MoLT, Lorsa)
}
"""By the name that ``variant=...`` and ``config.json`` give."""

__all__ = ["CLT", "SAE", "VARIANTS", "Crosscoder", "Dictionary", "Lorsa", "MoLT", "SkipTranscoder", "Transcoder"]
