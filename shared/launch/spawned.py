"""Starting a process that runs a function of a module, whatever the starter's own script is."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_script() -> Iterator[None]:
    """Within it, processes that ``multiprocessing`` spawns do not run the script again from which this one came.

    They would, so as to know its functions, which nobody here gives them; and a script that calls `granary.harvest`
    without ``if __name__ == "__main__":`` around it would begin its harvest anew in each of them, and die of that.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
