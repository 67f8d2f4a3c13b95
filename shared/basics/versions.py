"""Which software made something: what every record of a store, an SAE or an evaluation says of it."""

import platform
from importlib.metadata import PackageNotFoundError, version

from shared.basics.errors import GranaryError

DISTRIBUTION = "granary-sae"
"""Its name in the package registry, where another project has the name granary."""


def granary_version() -> str:
    """The version that is installed; raises GranaryError where these sources are not installed at all."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        raise GranaryError(f"{DISTRIBUTION} is not installed: pip install -e . in its checkout") from None


def software_versions(*packages: str) -> dict[str, str]:
    """Versions of Granary, of the installed `packages`, and of Python, in that order."""
    return {
        "granary": granary_version(),
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
    }
