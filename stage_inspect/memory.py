"""The memory that a process of an inspection takes at most, before it begins."""

import resource
from dataclasses import dataclass

from shared.basics.units import human_bytes
from shared.latents.layout import BINS, SUMS
from shared.sae.variants import Dictionary
from stage_inspect.job import PART_TOKENS, InspectJob
from stage_inspect.scan.batches import BATCH_TOKENS, ENCODE_ELEMENTS
from stage_inspect.scan.keep import LEAST_PENDING, ROWS
from stage_inspect.scan.places import position_edges
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import FIRED, LOG_BYTES

PAIR_BYTES = 220  # of one (token, latent) while a batch is counted: its columns, sorted copies, groups and keys
RECORD_BYTES = 32
COPIES = 3  # of a part's records and state while they are sorted, packed and written


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    base: int
    """The most that the process has taken so far: libraries and the dictionary."""
    keys: int
    part: int
    batch: int

    @property
    def peak(self) -> int:
        """All at once."""
        return self.base + self.keys + self.part + self.batch

    def __str__(self) -> str:
        named = {"dictionary and libraries": self.base, "keys": self.keys, "a part": self.part, "a batch": self.batch}
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in named.items())


def estimate(job: InspectJob, dictionary: Dictionary, settings: Settings) -> Memory:
    """From the sizes alone, and the number of latents that fire on the first tokens."""
    F, fired = job.num_latents, mean_fired(job, dictionary)
    kept = settings.top + settings.sample + settings.token_sample
    updating = max(ROWS, 1) * max(settings.top, settings.sample, settings.token_sample) * 8 * COPIES
    pending = max(LEAST_PENDING, F * max(settings.top, settings.sample) // 8) * 40
    state = F * (8 * len(FIRED) + 8 * len(SUMS) + 4 + 4 * BINS + 4 * len(position_edges(job.store.seq_len)))
    part_tokens = max((len(part) for part in job.parts), default=0) * job.store.seq_len
    records = int(min(part_tokens, PART_TOKENS * 4) * fired * 2) * RECORD_BYTES
    batch = int(min(BATCH_TOKENS, part_tokens) * fired) * PAIR_BYTES * 2
    encode = ENCODE_ELEMENTS * 4 * COPIES
    return Memory(
        base=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        keys=F * kept * 4 + min(updating, F * kept * 8) + pending,
        part=(min(records, LOG_BYTES) + state) * COPIES,
        batch=batch + min(encode, part_tokens * F * 4 * COPIES),
    )


def mean_fired(job: InspectJob, dictionary: Dictionary) -> float:
    """Latents that fire on a token, of the first ones."""
    return max(1.0, float((job.first_latents(dictionary).indices >= 0).sum(-1).double().mean()))
