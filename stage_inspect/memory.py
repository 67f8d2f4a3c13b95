"""The memory that a process of an inspection takes at most, before it begins."""

import math
import resource
from dataclasses import dataclass

from shared.basics.units import human_bytes
from shared.latents.layout import BINS, SUMS
from shared.sae.variants import Dictionary
from stage_inspect.finish.together import CELLS, PAIRS
from stage_inspect.job import InspectJob
from stage_inspect.scan.batches import BATCH_TOKENS, ENCODE_ELEMENTS
from stage_inspect.scan.keep import LEAST_PENDING, ROWS
from stage_inspect.scan.places import position_edges
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import FIRED, LATENTS_PER_BLOCK, LOG_BYTES

PAIR_BYTES = 220  # of one (token, latent) while a batch is counted: its columns, sorted copies, groups and keys
RECORD_BYTES = 32
COPIES = 3  # of records and state while they are sorted, packed and written
CELL_BYTES, TERM_BYTES = 48, 80  # of a pair of latents, and of a term of its sums, while they are compared
SAMPLED_BYTES = 40  # of one (token, latent) of the sample in which they are


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. The pass and what follows it do not meet in memory."""

    base: int
    """The most that the process has taken so far: libraries and the dictionary."""
    keys: int
    part: int
    batch: int
    finish: int

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.base + max(self.keys + self.part + self.batch, self.finish)

    def __str__(self) -> str:
        named = {"dictionary and libraries": self.base, "keys": self.keys, "a part": self.part, "a batch": self.batch}
        named["or the merge"] = self.finish
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in named.items())


def estimate(job: InspectJob, dictionary: Dictionary, settings: Settings) -> Memory:
    """From the sizes alone, and the number of latents that fire on the first tokens."""
    F, fired, T = job.num_latents, mean_fired(job, dictionary), job.store.seq_len
    kept = (settings.top, settings.sample, settings.token_sample)
    part_tokens, all_tokens = max(len(part) for part in job.parts) * T, len(job.contexts) * T
    updating = min(ROWS, F) * max(kept) * 8 * COPIES
    pending = sum(max(LEAST_PENDING, F * count // 8) for count in kept) * 12
    state = F * (8 * len(FIRED) + 8 * len(SUMS) + 4 + 4 * BINS + 4 * len(position_edges(T)))
    block = min(F, LATENTS_PER_BLOCK)
    merge = records(block, kept, all_tokens * fired * block / F, all_tokens * fired / F) * RECORD_BYTES * COPIES
    sampled = min(settings.together_tokens, all_tokens) * fired * SAMPLED_BYTES
    comparing = min(F * F, CELLS) * CELL_BYTES + min(PAIRS, sampled * fired) * TERM_BYTES
    found = records(F, kept, part_tokens * fired, part_tokens * fired / F) * RECORD_BYTES
    return Memory(
        base=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        keys=F * sum(kept) * 4 + updating + pending,
        part=int(min(found, LOG_BYTES) + state) * COPIES,
        batch=int(min(BATCH_TOKENS, part_tokens) * fired * PAIR_BYTES * 2 + min(ENCODE_ELEMENTS, T * F) * 4 * COPIES),
        finish=int(max(merge + state, sampled + comparing)),
    )


def records(latents: int, kept: tuple[int, ...], pairs: float, each: float) -> float:
    """Records written down while the smallest keys of each latent are looked for.

    The K smallest of n keys in random order are improved on K (1 + ln(n / K)) times; some more are taken before the
    keys are brought up to date.
    """
    improved = [count * (1 + math.log(max(1.0, each / count))) for count in kept]
    return sum(min(pairs, latents * times + LEAST_PENDING) for times in improved)


def mean_fired(job: InspectJob, dictionary: Dictionary) -> float:
    """Latents that fire on a token, of the first ones."""
    return max(1.0, float((job.first_latents(dictionary).indices >= 0).sum(-1).double().mean()))
