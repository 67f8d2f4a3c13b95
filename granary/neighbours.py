"""Granary's packages with common names, ``shared`` and ``conf``: whether it is ours that Python finds under them.

They lie in site-packages beside this one. Another project's, earlier on the path, would be imported in their place,
and what then fails has nothing to do with the cause.
"""

import importlib.util
import os
import sys

COMMON = ("shared", "conf")


def shadowed() -> str | None:
    """What is in the way, in one line; None where nothing is. Imports neither."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in COMMON:
        found = _file_of(name)
        if found is None:
            return f"Granary is not whole: {home} has no package {name!r}: install it again"
        if os.path.realpath(found) != os.path.join(home, name, "__init__.py"):
            return (
                f"Python finds another {name!r} before Granary's own: {found}: remove it from the path, or give "
                "Granary an environment of its own"
            )
    return None


def _file_of(name: str) -> str | None:
    """Where a package lies, or its folder where it has no ``__init__.py``; None where there is none."""
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    if spec is None:
        return getattr(loaded, "__file__", None)
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)
