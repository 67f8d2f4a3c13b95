"""Figures and names as people read them, on pages and in the terminal alike."""

import math
import re
from collections.abc import Sequence

FEW_CONTEXTS, FEW_TOKENS = 10, 10_000
"""Below either of these an interval is wide, and a latent that has not fired may only not have been met."""


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits for small numbers, significant ones for the rest, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.{max(digits - 2, 1)}f}"


def signed(value: float | None) -> str:
    """``+0.120``."""
    return "-" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def percent(value: float | None) -> str:
    """``1.2 %``."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.3g} %"


def short(digest: str | None) -> str:
    """The first 16 characters of a hash."""
    return (digest or "not recorded").removeprefix("sha256:")[:16]


def small_sample(tokens: int, contexts: int) -> str | None:
    """What to be told of an evaluation on few tokens; None for one on enough of them."""
    if contexts >= FEW_CONTEXTS and tokens >= FEW_TOKENS:
        return None
    return (
        f"Small sample: {tokens:,} tokens of {contexts:,} contexts. Intervals are wide, and latents count as dead that"
        " were only not met."
    )


def differing(names: Sequence[str]) -> list[str]:
    """The names without the pieces that all share: ``x8,k=16`` and ``x8,k=32`` become ``k=16`` and ``k=32``.

    Pieces end at a slash or a comma. Names that this would make equal or empty stay as they are.
    """
    pieces = [re.split(r"[/,]", name) for name in names]
    shared = set(pieces[0]).intersection(*pieces[1:]) if len(names) > 1 else set()
    short = [",".join(piece for piece in parts if piece not in shared) for parts in pieces]
    return short if all(short) and len(set(short)) == len(set(names)) else list(names)


def middle_cut(name: str, letters: int = 48) -> str:
    """A name of at most so many letters, the middle of a longer one left out: what tells names apart is at the ends."""
    if len(name) <= letters:
        return name
    kept = letters - 3
    return f"{name[: kept // 2]}...{name[-(kept - kept // 2) :]}"
