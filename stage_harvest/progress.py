"""What the user sees during a harvest, and how ranks tell rank 0 how far they are.

Ranks talk through the job's key-value store (torch's TCPStore), not through collectives: waiting there has no timeout
of minutes, and nobody has to stop to be counted.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, TypeVar

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from tqdm import tqdm

from shared.basics.units import human_time
from shared.parallel import World

log = logging.getLogger(__name__)

T = TypeVar("T")

_FOREVER = timedelta(days=30)
_POLL_SECONDS = 0.2
_NOTICES = itertools.count()  # every rank makes its notices in the same order


class Notices:
    """Counters and notes that all ranks of a job share; plain attributes in a world of one."""

    def __init__(self, world: World) -> None:
        self._store: Any = None
        self._local: dict[str, Any] = {}
        if world.size > 1:
            self._store = PrefixStore(f"granary_harvest_{next(_NOTICES)}", distributed_c10d._get_default_store())

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


def tokenise_bar(contexts: Iterable[T], total: int | None, seq_len: int, name: str = "tokenise") -> Iterator[T]:
    """Pass `contexts` on, counting their tokens in a bar; `total` contexts are expected, None if nobody knows."""
    with token_bar(name, None if total is None else total * seq_len) as bar:
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
        self,
        world: World,
        notices: Notices,
        *,
        contexts: int,
        todo: int,
        shard_contexts: int,
        seq_len: int,
        context_bytes: int,
        writers: int,
    ) -> None:
        """`contexts` of the store in all, `todo` of them for this run, over all ranks, `writers` of which write."""
        self.is_main = world.is_main
        self.notices = notices
        self.todo = todo
        self.done_before = contexts - todo
        self.shard_contexts = shard_contexts
        self.seq_len = seq_len
        self.context_bytes = context_bytes
        self.writers = writers
        self.start = time.perf_counter()
        self._reported_ms = 0
        self._wait_share = 0.0
        self._forecast_due = True
        self._bar = token_bar("harvest", contexts * seq_len, initial=self.done_before * seq_len, show=world.is_main)

    def advance(self, contexts: int, wait_seconds: float) -> None:
        """Count `contexts` just computed by this rank, which has waited `wait_seconds` for the disk so far."""
        total = self.notices.add("contexts", contexts)
        self._report_wait(wait_seconds)
        if self.is_main:
            self._show(total)

    def wait_for_all(self, contexts: int) -> None:
        """Report `contexts` of this rank as written; on rank 0, wait until all ranks have reported all of theirs."""
        written = self.notices.add("written", contexts)
        while self.is_main and written < self.todo:
            time.sleep(_POLL_SECONDS)
            written = self.notices.add("written", 0)
            self._show(self.notices.add("contexts", 0))

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self._bar.close()

    def report(self) -> None:
        """Log the run's figures."""
        seconds = time.perf_counter() - self.start
        if self.is_main and self.todo:
            log.info(
                "harvested %s tokens in %s: %s tokens/s, %.0f MB/s, %.0f %% of the time waiting for the disk",
                f"{self.todo * self.seq_len:,}",
                human_time(seconds),
                f"{self.todo * self.seq_len / seconds:,.0f}",
                self.todo * self.context_bytes / seconds / 1e6,
                100 * self._wait_share,
            )

    def _report_wait(self, wait_seconds: float) -> None:
        """Add what this rank has waited since it last did to the job's counter."""
        milliseconds = int(1000 * wait_seconds)
        total = self.notices.add("wait_ms", milliseconds - self._reported_ms)
        self._reported_ms = milliseconds
        self._wait_share = total / 1000 / self.writers / (time.perf_counter() - self.start)

    def _show(self, contexts: int) -> None:
        seconds = time.perf_counter() - self.start
        rate = contexts * self.context_bytes / seconds / 1e6
        shards, all_shards = ((n + self.done_before) // self.shard_contexts for n in (contexts, self.todo))
        self._bar.set_postfix_str(
            f"shard {shards} of {max(all_shards, 1)}, {rate:.0f} MB/s, disk wait {self._wait_share:.0%}", refresh=False
        )
        self._bar.update((self.done_before + contexts) * self.seq_len - self._bar.n)
        if self._forecast_due and min(self.shard_contexts * self.writers, self.todo) <= contexts < self.todo:
            self._forecast_due = False
            left = seconds / contexts * (self.todo - contexts)
            self._bar.clear()
            log.info("%-9s %s more at this speed, until about %s", "expected", human_time(left), clock_after(left))
            self._bar.refresh()


def clock_after(seconds: float) -> str:
    """The local time then, with the day where it is another one."""
    then = datetime.now() + timedelta(seconds=seconds)
    return then.strftime("%H:%M" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M")
