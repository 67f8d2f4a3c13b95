"""Overrides of keys that count something may give their number in short: ``schedule.tokens=50M``."""

import re
from collections.abc import Sequence

from shared.basics.config import marks
from shared.basics.errors import GranaryError
from shared.basics.numbers import parse_count

# What is a number, if perhaps a wrong one; null, auto, ${other.key} and lists go on to Hydra as they are.
BEGINS_AS_NUMBER = re.compile(r"\d")


def expand_counts(overrides: Sequence[str], schema: type) -> list[str]:
    """Rewrite the values of the keys that `schema` marks as counts as whole numbers, those of a sweep each.

    Raises GranaryError naming the key for a value that is no whole number.
    """
    counts = {name for name, mark in marks(schema) if mark.count}
    expanded = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.lstrip("+") in counts:
            value = ",".join(_expand(key, part) for part in value.split(","))
        expanded.append(f"{key}{equals}{value}")
    return expanded


def _expand(key: str, value: str) -> str:
    if not BEGINS_AS_NUMBER.match(value):
        return value
    try:
        return str(parse_count(value))
    except GranaryError as error:
        raise GranaryError(f"{key}={error}") from None
