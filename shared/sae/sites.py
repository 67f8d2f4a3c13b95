"""Where a dictionary reads and where it writes: names of arrays in an activation store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from shared.basics.errors import GranaryError

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "sequence"]


@dataclass(frozen=True)
class Sites:
    """What a dictionary reads and what it must produce.

    Activations of several sites are laid side by side along their last axis, in the order given here: [..., sum of
    widths]. An SAE reads what it writes.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    unit: Unit = "token"
    """What one row of the input is: a token, or a whole sequence (for encoders that attend)."""

    def __post_init__(self) -> None:
        """Raises GranaryError for an empty side, and for a site that one side names twice."""
        for side, names in (("reads", self.reads), ("writes", self.writes)):
            if not names:
                raise GranaryError(f"a dictionary needs at least one site that it {side}")
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise GranaryError(f"a dictionary {side} {twice[0]} twice: name each site once")

    @classmethod
    def of(cls, *names: str) -> Self:
        """Sites that are read and written alike."""
        return cls(names, names)

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, object]) -> Self | None:
        """Those that a provenance records, as ``record`` writes them; None where it records none."""
        hook, reads, writes = (provenance.get(name) for name in ("hook", "reads", "writes"))
        if isinstance(hook, str):
            return cls.of(hook)
        if isinstance(reads, list | tuple) and isinstance(writes, list | tuple):
            return cls(tuple(map(str, reads)), tuple(map(str, writes)))
        return None

    def record(self) -> dict[str, object]:
        """Return what a provenance holds: one ``hook`` of an SAE, or ``reads`` and ``writes``."""
        if self.is_autoencoder and len(self.reads) == 1:
            return {"hook": self.reads[0]}
        return {"reads": list(self.reads), "writes": list(self.writes)}

    @property
    def names(self) -> tuple[str, ...]:
        """Every site once, those that are read first."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def is_autoencoder(self) -> bool:
        """Whether it must produce what it reads."""
        return self.reads == self.writes

    def widths(self, widths: Mapping[str, int]) -> "SiteWidths":
        """The widths of both sides, from those of all arrays."""
        return SiteWidths(tuple(widths[name] for name in self.reads), tuple(widths[name] for name in self.writes))

    def pick(self, activations: Mapping[str, "Tensor"]) -> "tuple[Tensor, Tensor]":
        """What is read and what must be produced, [..., d_in] and [..., d_out]; one tensor for an autoencoder."""
        x = side_by_side(activations, self.reads)
        return x, x if self.is_autoencoder else side_by_side(activations, self.writes)

    def __str__(self) -> str:
        """``layers.2.resid_post``, or ``layers.2.mlp_in -> layers.2.mlp_out``."""
        reads, writes = ", ".join(self.reads), ", ".join(self.writes)
        return reads if self.is_autoencoder else f"{reads} -> {writes}"


@dataclass(frozen=True)
class SiteWidths:
    """Features of each site, in the order of ``Sites``."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def d_in(self) -> int:
        """Width of all that is read, side by side."""
        return sum(self.reads)

    @property
    def d_out(self) -> int:
        """Width of all that is written, side by side."""
        return sum(self.writes)


def slices(names: Sequence[str], widths: Sequence[int]) -> dict[str, slice]:
    """Where each site lies among the columns of sites side by side."""
    found, start = {}, 0
    for name, width in zip(names, widths, strict=True):
        found[name] = slice(start, start + width)
        start += width
    return found


def side_by_side(activations: Mapping[str, "Tensor"], names: Sequence[str]) -> "Tensor":
    """Activations of some sites along the last axis, [..., sum of widths]; of one site its own tensor, no copy."""
    if len(names) == 1:
        return activations[names[0]]
    import torch  # not needed by a configuration, which is checked without

    return torch.cat([activations[name] for name in names], dim=-1)
