"""What decides the content of a latents folder, beside the store and the dictionary."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Part of the identity of a folder."""

    window: int
    """Tokens of a window."""
    top: int
    """Strongest records kept of each latent."""
    sample: int
    """Windows of each latent's uniform sample."""
    token_sample: int
    """Firing tokens of each latent's uniform sample."""
    together_tokens: int
    """Tokens wished for the sample in which latents are compared."""
    pool: int
    """Windows of the shared pool of silent ones."""
    seed: int
    origin: int
    """log2 of the lower edge of the histogram's bin 1."""

    @property
    def before(self) -> int:
        """Tokens shown before a record's peak: most of them, for what a causal model has seen."""
        return 3 * self.window // 4 - 1

    @property
    def after(self) -> int:
        """Tokens shown behind it."""
        return self.window // 4

    def to_json(self) -> dict[str, Any]:
        """All of them, for ``meta.json``."""
        return {**asdict(self), "before": self.before, "after": self.after}
