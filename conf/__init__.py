"""The Hydra tree: every default and every path. A package, so that an installed Granary finds it (``pkg://conf``)."""
