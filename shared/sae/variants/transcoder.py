"""The transcoder (Dunefsky, Chlenski and Nanda 2024, 2406.11944): it reads one place and must produce another.

    f = activation(W_enc x~ + b_enc);   y^ = denormalise(sum_i f_i W_dec[i] + b_dec)

for example the MLP's output from its input: a sparse stand-in for the MLP itself. b_dec lies in the space that is
written and is not taken off the input (sparsify issue 49). One that reads what it writes is an SAE.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.sites import SiteWidths
from shared.sae.variants.one_group import OneGroup


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(DictionaryConfig):
    """A transcoder of one site to one site."""

    kind: ClassVar[str] = "transcoder"
    width_fields: ClassVar[tuple[str, ...]] = ("d_in", "d_out")

    d_in: int
    """Width of the activations that are read."""
    d_out: int
    """Width of those that are written."""

    @property
    def widths(self) -> SiteWidths:
        """One site on each side."""
        return SiteWidths((self.d_in,), (self.d_out,))

    @property
    def is_autoencoder(self) -> bool:
        """Only where both sides are one place."""
        return self.sites is not None and self.sites.is_autoencoder

    @classmethod
    def from_widths(cls, widths: SiteWidths) -> dict[str, Any]:
        """One width on each side."""
        if len(widths.reads) != 1 or len(widths.writes) != 1:
            raise GranaryError(
                f"a transcoder reads one site and writes one, not {len(widths.reads)} and {len(widths.writes)}: "
                "give reads=... and writes=... one name each"
            )
        return {"d_in": widths.reads[0], "d_out": widths.writes[0]}


class Transcoder(OneGroup):
    """A transcoder as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = TranscoderConfig
    config: TranscoderConfig
