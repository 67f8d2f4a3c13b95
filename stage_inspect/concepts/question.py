"""What a search for a concept's latents is asked, by the command or from the explorer's page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.basics.config import Split


@dataclass(frozen=True, kw_only=True)
class Question:
    """Concepts, and the tokens among which they are looked for."""

    python: Sequence[str] = ()
    """Concepts of Python by name, or all."""
    regex: Sequence[str] = ()
    token: Sequence[str] = ()
    """Texts of single tokens."""
    spans: Path | None = None
    """A file of marked spans."""
    split: Split = Split.heldout
    contexts: int | None = None
    """So many of the split, evenly spaced; None: all."""
    count: int = 5
    """Latents listed for each concept."""
