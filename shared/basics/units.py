"""Sizes and times as people write and read them."""

import re
from collections.abc import Iterable

from shared.basics.errors import GranaryError

GIB = 1 << 30
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kMGTP]?)(?P<binary>i?)B?", re.IGNORECASE)


def human_bytes(size: float) -> str:
    """``1.5 GB``; powers of 1000."""
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def parse_bytes(text: str | int, key: str) -> int:
    """Bytes of ``2TB``, ``500 GB``, ``1.5TiB`` or a plain number; raises GranaryError naming `key` for all else."""
    found = _SIZE.fullmatch(str(text).strip())
    if found is None or (found["binary"] and not found["unit"]):
        raise GranaryError(f"{key}={text} is not a size: write for example 2TB, 500GB, 1.5TiB, or null")
    power = " kmgtp".index(found["unit"].lower() or " ")
    return int(float(found["number"]) * (1024 if found["binary"] else 1000) ** power)


def human_time(seconds: float) -> str:
    """``4.2 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def spans(numbers: Iterable[int], most: int | None = None) -> str:
    """Ascending numbers as ``0-4, 7, 9-12``; of more than `most` runs the first ones and ``...``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts if most is None or len(texts) <= most else [*texts[:most], "..."])
