"""Several requests at once, where waiting for one would leave the others idle."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

IO_THREADS = 8
FEWEST = 4  # fewer requests than this are not worth the threads


def on_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` over `items`, in their order."""
    if len(items) < FEWEST:
        return [function(item) for item in items]
    with ThreadPoolExecutor(IO_THREADS, thread_name_prefix="granary-io") as pool:
        return list(pool.map(function, items))
