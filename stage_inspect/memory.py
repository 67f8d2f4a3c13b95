"""The memory that a process of an inspection takes at most, before it begins."""

import math
from dataclasses import dataclass

import numpy as np

from shared.basics.memory import peak_memory
from shared.basics.units import human_bytes
from shared.kernels.attention.tiles import TILE_SCORES
from shared.latents.layout import BINS, SUMS
from shared.lm.head import head_size
from shared.sae.variants import Dictionary
from shared.sae.variants.lorsa import LorsaConfig
from stage_inspect.finish.together import CELLS, FILLED, PAIRS
from stage_inspect.finish.weights import BLOCK_ELEMENTS, MOST_COMPARED, ROWS
from stage_inspect.job import PROBE_TOKENS, InspectJob
from stage_inspect.scan.batches import BATCH_TOKENS, ENCODE_ELEMENTS
from stage_inspect.scan.keep import LEAST_PENDING
from stage_inspect.scan.log import BESIDE, PICTURE_RECORD, REGIONS, TOKEN_RECORD, WINDOW_RECORD
from stage_inspect.scan.places import position_edges
from stage_inspect.scan.scan import POOL_MARGIN
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import FIRED, LATENTS_PER_BLOCK, LOG_BYTES

WINDOW_BYTES, TOKEN_BYTES, PICTURE_BYTES, REGION_BYTES = (
    sum(np.dtype(dtype).itemsize for dtype in record.values())
    for record in (WINDOW_RECORD, TOKEN_RECORD, PICTURE_RECORD, REGIONS)
)
PICTURE_BYTES, REGION_BYTES = (
    sum(np.dtype(one).itemsize for one in each.values()) for each in (PICTURE_RECORD, REGIONS)
)
BESIDE_BYTES = sum(np.dtype(dtype).itemsize for dtype in BESIDE.values())  # of an active token beside a peak
PAIR_BYTES = 160  # of one (token, latent) while a batch is counted: its columns, sorted copies, groups and keys
PENDING_BYTES, UPDATE_BYTES = 12, 40  # of a key that does not count yet, and while it is made to
MERGE_COPIES = 3  # of records while they are joined, sorted and written
TABLE_BYTES, TABLE_TERM_BYTES = 24, 40  # of a cell of the table of pairs of latents, and of a term added to it
SORTED_TERM_BYTES = 80  # of a term of the sums of pairs that are found by sorting
PAIR_SCORE_BYTES = 130  # of a pair that was found, while it is scored and ranked
SAMPLED_BYTES = 64  # of one (token, latent) of the sample in which they are
POOL_BYTES = 40  # of one in the windows of which the pool is chosen
PLANE_COPIES = 4  # of the float64 matrix of which the map's axes are
PATTERN_COPIES = 4  # of the scores of a tile of heads that attend: masked, softmaxed
LOGIT_BYTES = 36  # of a logit of a block: itself, its cell, its deviation, and those of the block before
LATER_BYTES = 32 << 20  # of code that is first loaded on the way, stacks of threads, and the holes of heaps


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. The pass and what follows it do not meet in memory."""

    base: int
    """The most that the process has taken so far, libraries and the dictionary; and `LATER_BYTES`."""
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
    """Estimate from the sizes alone, and what fires on the first tokens."""
    F, T = job.num_latents, job.store.seq_len
    fired, beside = first_firing(job, dictionary)
    of_context = dict(zip(job.contexts.tolist(), job.trainable.tolist(), strict=True))
    part_pairs = fired * max(sum(of_context[context] for context in part.tolist()) for part in job.parts)
    all_tokens = int(job.trainable.sum())
    all_pairs = fired * all_tokens
    kept = {"top": settings.top, "sample": settings.sample, "tokens": settings.token_sample}
    bytes_of = dict.fromkeys(kept, WINDOW_BYTES + beside * BESIDE_BYTES) | {"tokens": TOKEN_BYTES}
    if job.store.plan.has_images:  # of a picture, a latent fires on as large a part as of the first tokens
        kept["pictures"] = settings.top
        bytes_of["pictures"] = PICTURE_BYTES + (1 + beside * T / PROBE_TOKENS) * REGION_BYTES

    def logs(latents: int, pairs: float) -> dict[str, float]:
        """Bytes of the records of so many latents that are found among these pairs (token, latent)."""
        groups = dict.fromkeys(kept, pairs / (1 + beside)) | {"tokens": pairs}
        return {name: records(latents, count, groups[name]) * bytes_of[name] for name, count in kept.items()}

    found = logs(F, part_pairs)
    least = {name: min(found[name], F * count * bytes_of[name]) for name, count in kept.items()}
    if sum(found.values()) > LOG_BYTES:  # then what has become superfluous is let go
        scale = max(LOG_BYTES, sum(least.values())) / sum(found.values())
        found = {name: size * min(1.0, scale) for name, size in found.items()}
    pending = [min(max(LEAST_PENDING, F * count // 8), part_pairs) for count in kept.values()]
    state = F * (8 * len(FIRED) + 8 * len(SUMS) + 4 + 4 * BINS + 4 * len(position_edges(T)))
    batch = min(BATCH_TOKENS * fired, part_pairs) * PAIR_BYTES + min(ENCODE_ELEMENTS, T * F) * 4 + attending(job)
    copies = max(batch, *found.values())  # records are sorted after the last batch, one kind at a time

    block = min(F, LATENTS_PER_BLOCK)
    merge = sum(logs(block, all_pairs * block / F).values()) * MERGE_COPIES + 2 * state * block / F
    sampled = min(settings.together_tokens, all_tokens) * fired
    terms = min(PAIRS, sampled * fired)
    comparing = sampled * SAMPLED_BYTES + pairing(F, terms, is_table=sampled * fired >= FILLED * F * F)
    pool = min(POOL_MARGIN * settings.pool * settings.window, all_tokens) * fired * POOL_BYTES
    return Memory(
        base=peak_memory() + LATER_BYTES,
        keys=int(F * sum(kept.values()) * 4 + sum(pending) * PENDING_BYTES + max(pending) * UPDATE_BYTES),
        part=int(sum(found.values()) + state),
        batch=int(copies),
        finish=int(max(merge, comparing, pool, weights(job, dictionary))),
    )


def attending(job: InspectJob) -> int:
    """Bytes of the patterns that are held at a time, where the dictionary attends."""
    config, T = job.folder.config, job.store.seq_len
    if not isinstance(config, LorsaConfig):
        return 0
    contexts = max(1, min(BATCH_TOKENS, ENCODE_ELEMENTS // config.d_latent) // T)
    return min(max(TILE_SCORES, T * T), contexts * config.qk_heads * T * T) * PATTERN_COPIES * 4


def pairing(F: int, terms: float, *, is_table: bool) -> float:
    """Bytes taken while the pairs of a block of latents are counted, then ranked, from at most so many terms."""
    if not is_table:
        return terms * SORTED_TERM_BYTES
    cells = min(F * F, max(CELLS, F))
    return max(cells * TABLE_BYTES + terms * TABLE_TERM_BYTES, cells * PAIR_SCORE_BYTES)


def weights(job: InspectJob, dictionary: Dictionary) -> int:
    """Bytes taken while the weights are looked at, beside the dictionary itself; on a GPU they are its own."""
    if dictionary.b_dec.is_cuda:
        return 0
    F, D = job.num_latents, dictionary.widths.d_out
    rows = min(F, ROWS) * D * 8 * 3
    copies = F * D * 4 if len(dictionary.groups) > 1 else 0
    compared = F * D * 4 + BLOCK_ELEMENTS * 4 * 2 if F <= MOST_COMPARED else 0
    plane = D * D * 8 * PLANE_COPIES + rows
    logits = 0
    if job.model is not None:
        head, vocabulary = head_size(job.model.path, job.model.revision)
        logits = head + F * D * 4 + min(max(BLOCK_ELEMENTS, vocabulary), F * vocabulary) * LOGIT_BYTES
    return copies + max(compared, plane, logits)


def records(latents: int, count: int, found: float) -> float:
    """Records written down while the `count` smallest keys of each latent are looked for among `found` in all.

    The K smallest of n keys in random order are improved on K (1 + ln(n / K)) times; some more are taken before the
    keys are brought up to date.
    """
    improved = count * (1 + math.log(max(1.0, found / latents / count)))
    return min(found, latents * improved + LEAST_PENDING)


def first_firing(job: InspectJob, dictionary: Dictionary) -> tuple[float, float]:
    """Latents that fire on a token, of the first ones; and on how many more of these each of them does."""
    indices = job.first_latents(dictionary).indices.cpu().numpy()
    there = indices[indices >= 0]
    fired = max(1.0, len(there) / max(1, len(indices)))
    return fired, len(there) / max(1, len(np.unique(there))) - 1
