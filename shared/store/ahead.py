"""Reading contexts in a given order, a few of them ahead of who uses them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from shared.store.store import Store

READ_THREADS = 4


def read_ahead(store: Store, wanted: Iterable[tuple[int, Sequence[str]]]) -> Iterator[dict[str, Tensor]]:
    """Activations [T, D] by site, for each (context, sites) in order; a few reads are in flight."""
    items = iter(wanted)
    pending: deque[dict[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="granary-read") as pool:

        def submit() -> None:
            while sum(map(len, pending)) < READ_THREADS and (item := next(items, None)) is not None:
                context, sites = item
                pending.append({site: pool.submit(store.read_context, site, context) for site in sites})

        submit()
        while pending:
            reads = pending.popleft()
            yield {site: read.result() for site, read in reads.items()}
            submit()
