"""What the user sees during a harvest, and how ranks tell rank 0 how far they are.

Ranks talk through the job's key-value store (torch's TCPStore), not through collectives: waiting there has no timeout
of minutes, and nobody has to stop to be counted.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from tqdm import tqdm

from shared.parallel import World

log = logging.getLogger(__name__)

T = TypeVar("T")

_FOREVER = timedelta(days=30)
_POLL_SECONDS = 0.2
_BOARDS = itertools.count()  # every rank makes its boards in the same order


class Board:
    """Counters and notes that all ranks of a job share; plain attributes in a world of one."""

    def __init__(self, world: World) -> None:
        self._store: Any = None
        self._local: dict[str, Any] = {}
        if world.size > 1:
            self._store = PrefixStore(f"granary_harvest_{next(_BOARDS)}", distributed_c10d._get_default_store())

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter; returns its value over all ranks."""
        if self._store is None:
            self._local[counter] = self._local.get(counter, 0) + amount
            return int(self._local[counter])
        return int(self._store.add(counter, amount))

    def post(self, note: str, text: str) -> None:
        """Leave `text` for every rank."""
        if self._store is None:
            self._local[note] = text
        else:
            self._store.set(note, text)

    def read(self, note: str) -> str:
        """The text posted as `note`; waits for it (torchrun ends the job if the poster dies)."""
        if self._store is None:
            return str(self._local[note])
        self._store.wait([note], _FOREVER)
        return bytes(self._store.get(note)).decode()


def tokenise_bar(contexts: Iterable[T], total: int | None, seq_len: int) -> Iterator[T]:
    """Pass `contexts` on, counting their tokens in a bar; `total` contexts are expected, None if nobody knows."""
    with token_bar("tokenise", None if total is None else total * seq_len) as bar:
        for context in contexts:
            yield context
            bar.update(seq_len)


def token_bar(name: str, total: int | None, *, initial: int = 0, show: bool = True) -> Any:
    """A progress bar that counts tokens."""
    return tqdm(
        total=total,
        initial=initial,
        unit="tok",
        unit_scale=True,
        desc=name,
        disable=not show,
        # In a log file a line every half minute; on a terminal ten a second would be no use either.
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


class HarvestProgress:
    """The one bar of a job: tokens of all ranks, with tokens/s, MB/s, share of time waiting for the disk, ETA."""

    def __init__(
        self, world: World, board: Board, *, contexts: int, todo: int, seq_len: int, context_bytes: int
    ) -> None:
        """`contexts` of the store in all, `todo` of them for this run, over all ranks."""
        self.is_main = world.is_main
        self.board = board
        self.todo = todo
        self.done_before = contexts - todo
        self.seq_len = seq_len
        self.context_bytes = context_bytes
        self.start = time.perf_counter()
        self.wait_seconds = 0.0
        self._bar = token_bar("harvest", contexts * seq_len, initial=self.done_before * seq_len, show=world.is_main)

    def advance(self, contexts: int, wait_seconds: float) -> None:
        """Count `contexts` just computed by this rank, which has waited `wait_seconds` for the disk so far."""
        self.wait_seconds = wait_seconds
        total = self.board.add("contexts", contexts)
        if self.is_main:
            self._show(total)

    def wait_for_all(self, contexts: int) -> None:
        """Report `contexts` of this rank as written; on rank 0, wait until all ranks have reported all of theirs."""
        written = self.board.add("written", contexts)
        while self.is_main and written < self.todo:
            time.sleep(_POLL_SECONDS)
            written = self.board.add("written", 0)
            self._show(self.board.add("contexts", 0))

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self._bar.close()

    def _show(self, contexts: int) -> None:
        seconds = time.perf_counter() - self.start
        rate = contexts * self.context_bytes / seconds / 1e6
        self._bar.set_postfix_str(f"{rate:.0f} MB/s, disk wait {self.wait_seconds / seconds:.0%}", refresh=False)
        self._bar.update((self.done_before + contexts) * self.seq_len - self._bar.n)

    def report(self) -> None:
        """Log the run's figures."""
        seconds = time.perf_counter() - self.start
        if self.is_main and self.todo:
            log.info(
                "harvested %s tokens in %.1f s: %s tokens/s, %.0f MB/s, %.0f %% of the time waiting for the disk",
                f"{self.todo * self.seq_len:,}",
                seconds,
                f"{self.todo * self.seq_len / seconds:,.0f}",
                self.todo * self.context_bytes / seconds / 1e6,
                100 * self.wait_seconds / seconds,
            )
