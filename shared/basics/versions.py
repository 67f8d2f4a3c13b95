"""Which software made something: what every record of a store, an SAE or an evaluation says of it."""

import platform
from importlib.metadata import version

DISTRIBUTION = "granary"


def software_versions(*packages: str) -> dict[str, str]:
    """Versions of Granary, of the installed `packages`, and of Python, in that order."""
    return {
        "granary": version(DISTRIBUTION),
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
    }
