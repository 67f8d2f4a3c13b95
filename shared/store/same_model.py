"""Whether two records of a language model are of the same one. Opens no model, and imports nothing heavy."""

from typing import Any

from shared.basics.errors import GranaryError


def check_same_model(one: str, identity: dict[str, Any], other: str, expected: dict[str, Any]) -> None:
    """Raise GranaryError if two records of the language model that both exist differ in configuration or weights."""
    for key in ("config_hash", "weights_hash"):
        if key in identity and key in expected and identity[key] != expected[key]:
            what = "configuration" if key == "config_hash" else "weights"
            raise GranaryError(
                f"{one} belongs to model {identity.get('id')}, {other} to {expected.get('id')}: the models'"
                f" {what} differ"
            )
