"""The pass: parts of the store that nobody has done yet, each to a file. Any process may do any part, in any order."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from shared.store.io.base import ObjectIO
from stage_inspect.job import InspectJob
from stage_inspect.scan import parts
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import PartState, Wanted

POOL_MARGIN = 4  # windows drawn for the pool for each that it holds: those with few trainable tokens don't count


def missing_parts(io: ObjectIO, job: InspectJob, identity: str) -> list[int]:
    """Parts that are still to be done; raises GranaryError where one is of other inputs."""
    there = parts.numbers_of(io)
    for number in there:
        parts.PartFile.open(io, parts.part_key(number), identity)
    return [number for number in range(len(job.parts)) if number not in set(there)]


def shares(job: InspectJob, settings: Settings) -> tuple[float, float]:
    """Shares of all tokens and of all windows that are drawn, for what is compared and for the pool."""
    tokens = max(1, int(job.trainable.sum()))
    return min(1.0, settings.together_tokens / tokens), min(1.0, POOL_MARGIN * settings.pool * settings.window / tokens)


def scan(
    io: ObjectIO,
    job: InspectJob,
    reader: BatchReader,
    settings: Settings,
    identity: str,
    numbers: list[int],
    tell: Callable[[int], None],
) -> None:
    """Do these parts and put their files; `tell` hears of tokens as they are done."""
    together, pool = shares(job, settings)
    wanted = Wanted(job.num_latents, settings, pictures=job.store.plan.has_images)
    with ThreadPoolExecutor(1, thread_name_prefix="granary-count") as worker:
        for number in numbers:
            state = PartState(job.num_latents, job.store.seq_len, settings, wanted, together, pool)
            counting: Future[None] | None = None  # of the batch before, while the next one is encoded
            for batch in reader.batches(job.parts[number]):
                if counting is not None:
                    counting.result()
                counting = worker.submit(
                    state.add,
                    batch.places,
                    batch.at_N,
                    batch.indices_NK,
                    batch.values_NK,
                    batch.is_heldout,
                    batch.shown,
                )
                tell(len(batch.places.place_P))
            if counting is not None:
                counting.result()
            parts.write(io, parts.part_key(number), identity, [*state.blocks(), state.whole()])
