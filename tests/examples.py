"""How many examples a property is tried on: a quarter of them in the default tests, which draw others each time."""

from hypothesis import settings


def examples(most: int) -> int:
    """`most` under the profile of all tests, its share under another (tests/conftest.py)."""
    return max(4, most * settings.default.max_examples // settings.get_profile("whole").max_examples)
