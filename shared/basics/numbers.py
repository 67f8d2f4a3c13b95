"""Numbers as people write them, ``50M``, ``1e6``, ``2_000_000``, and in names: ``layer_9`` before ``layer_10``."""

import re
from decimal import Decimal

from shared.basics.errors import GranaryError

POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
NUMBER = re.compile(r"(\d[\d_]*(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_count(text: str) -> int:
    """The number that `text` stands for; k, M, B (or G) and T are powers of a thousand.

    Raises GranaryError, saying what may be written, for what is no number and for a number that is not whole.
    """
    found = NUMBER.fullmatch(text.strip())
    power = POWERS.get(found[2].lower()) if found else None
    number = None if found is None or power is None else Decimal(found[1].replace("_", "")) * power
    if number is None or number != int(number):
        raise GranaryError(f"{text} is no whole number: write it as 50000000, 50_000_000, 5e7 or 50M")
    return int(number)


def natural_key(path: str) -> list[tuple[int, str]]:
    """Orders ``k=8`` before ``k=16``."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path)]
