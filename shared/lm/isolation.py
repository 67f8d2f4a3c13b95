"""Whether documents packed into one context have the activations they have alone, measured on the loaded model.

Isolation is a property of a model's code: of its masks, of layers that carry a state, of whatever it computes once per
forward from all positions. No list of families can promise it, so a probe compares a packed forward with forwards of
single documents, at every hook, as the caller loaded the model.

Shapes: L tokens of a document, T positions of a context, D = d_model.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError, first_line
from shared.basics.units import spans
from shared.lm.hooks import capture
from shared.lm.modulepoint import Point
from shared.lm.packed import packed_inputs

# Most relative difference of one position, by the dtype of the forward: float sums over batches of other shapes.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# In 16 bits the limit grows to this many times the noise: what a document alone differs from itself in a batch of two.
NOISE_FACTOR = 4

SHORT_LENGTHS = (7, 23, 3, 41)
BEYOND_LIMIT = 24  # tokens of a long document behind the limit it is to cross
# Names under which configurations state a length at which attention or positions begin to behave otherwise.
_LIMIT = re.compile(r"window|chunk|original_max_position|block_size")


@dataclass(frozen=True, slots=True)
class Isolation:
    """What the probe found."""

    holds: bool
    worst: float
    """Largest relative difference of one position at one hook: norm of the difference over the norm alone."""
    tolerance: float
    where: str
    """Hook, positions and document of `worst`, as part of a sentence."""
    documents: int
    tokens: int

    def summary(self) -> str:
        """One line for a log and a store's versions."""
        return (
            f"{self.documents} documents of {self.tokens} tokens, packed and alone, differ by {self.worst:.0e} at most"
            f" (tolerance {self.tolerance:.0e})"
        )


def position_limits(config: PretrainedConfig) -> list[int]:
    """Lengths that the configuration names: windows, chunks, the original positions of a stretched rope; ascending."""
    return sorted(set(_limits(config.to_dict())))


def _limits(record: dict[str, Any]) -> Iterator[int]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _limits(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and _LIMIT.search(name):
            yield value


def probe_lengths(config: PretrainedConfig, seq_len: int, most_tokens: int) -> list[int]:
    """Lengths of the probe's documents, each at most `seq_len`: short ones, and one beyond each limit that fits.

    Long and short alternate, so that short ones stand before and behind a long one. Limits whose documents would make
    the sum exceed `most_tokens` are left out, the largest first; a limit of `seq_len` or more no document crosses.
    """
    short = [min(length, seq_len) for length in SHORT_LENGTHS]
    long: list[int] = []
    for limit in position_limits(config):
        length = min(limit + BEYOND_LIMIT, seq_len)
        if limit < seq_len and length not in long and sum(short) + sum(long) + length <= most_tokens:
            long.append(length)
    lengths = short[:1]
    for number, length in enumerate(long):
        lengths += [length, short[1 + number % 2]]
    return lengths + short[1:] if not long else lengths + short[2:]


def pack_documents(documents: Sequence[Tensor], seq_len: int) -> list[list[int]]:
    """Numbers of the documents of each context of at most `seq_len` tokens, in order."""
    contexts: list[list[int]] = []
    room = 0
    for number, ids_L in enumerate(documents):
        if len(ids_L) > room:
            contexts.append([])
            room = seq_len
        contexts[-1].append(number)
        room -= len(ids_L)
    return contexts


def at_the_end(documents: Sequence[Tensor], seq_len: int) -> tuple[Tensor, list[int]]:
    """A context whose front is filled with other tokens: those, and the numbers of the documents that end it.

    What a model makes of places in a context rather than in a document may be right at the front alone, as a bias by
    distance in bfloat16, which counts to 256. Documents are taken in order while they fill no more than half.
    """
    numbers, room = [], seq_len // 2
    for number, ids_L in enumerate(documents):
        if len(ids_L) <= room:
            numbers.append(number)
            room -= len(ids_L)
    tokens = torch.cat(list(documents))
    fill = seq_len - sum(len(documents[number]) for number in numbers)
    return tokens.repeat(-(-fill // len(tokens)))[:fill], numbers


def measure_isolation(
    model: PreTrainedModel,
    hooks: Sequence[Point],
    documents: Sequence[Tensor],
    *,
    seq_len: int,
    batch_contexts: int,
) -> Isolation:
    """Compare `documents` (int64 [L] on the model's device) packed into contexts with each one alone, at every hook.

    Contexts of at most `seq_len` tokens go through the model `batch_contexts` at a time, and then one of `seq_len`
    tokens with documents at its end. No more than one such batch of activations is held at once, and one document's.
    Raises GranaryError where the model's forward fails.

    In float32 no position may be beyond the tolerance. In 16 bits rounding alone may flip a router of experts at single
    positions, so each document is also run twice in a batch of two: one position more than twice those that this moves
    is let pass, and a leak, which moves positions of every document but the first, is not.
    """
    tolerance = TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])
    is_exact = model.dtype == torch.float32
    tallies = {hook: _Tally() for hook in hooks}
    contexts = pack_documents(documents, seq_len)
    batches = [contexts[first : first + batch_contexts] for first in range(0, len(contexts), batch_contexts)]
    filler_L, last = at_the_end(documents, seq_len)
    filler = len(documents)
    if last:
        batches.append([[filler, *last]])
    laid = [*documents, filler_L]
    for batch in batches:
        packed = _run_packed(model, hooks, laid, batch)
        for row, numbers in enumerate(batch):
            start = 0
            for number in numbers:
                ids_L = laid[number]
                if number == filler:  # in front of the others, and not compared
                    start += len(ids_L)
                    continue
                alone = _run_alone(model, hooks, ids_L)
                twice = alone if is_exact else _run_alone(model, hooks, ids_L, copies=2)
                for hook in hooks:
                    got_LD, wanted_LD = packed[hook][row, start : start + len(ids_L)], alone[hook][0]
                    noise_L = position_differences(twice[hook][0], wanted_LD)
                    limit = max(tolerance, NOISE_FACTOR * noise_L.median().item())
                    tallies[hook].add(position_differences(got_LD, wanted_LD), noise_L, limit)
                start += len(ids_L)
    broken = {hook: tally for hook, tally in tallies.items() if tally.beyond > tally.pardoned(is_exact)}
    hook, tally = max((broken or tallies).items(), key=lambda item: item[1].worst)
    return Isolation(
        holds=not broken,
        worst=tally.worst,
        tolerance=tolerance,
        where=f"{hook} at {tally.where}",
        documents=len(documents),
        tokens=sum(map(len, documents)),
    )


@dataclass(slots=True)
class _Tally:
    """Positions of one hook over all documents."""

    worst: float = -1.0
    where: str = ""
    beyond: int = 0
    noisy: int = 0

    def add(self, far_L: Tensor, noise_L: Tensor, limit: float) -> None:
        beyond_L = far_L > limit
        self.beyond += int(beyond_L.sum())
        self.noisy += int((noise_L > limit).sum())
        if far_L.max().item() > self.worst:
            self.worst = far_L.max().item()
            chosen_L = beyond_L if beyond_L.any() else far_L == far_L.max()
            found = spans(chosen_L.nonzero().flatten().tolist(), most=3)
            self.where = f"positions {found} of a document of {len(far_L)} tokens"

    def pardoned(self, is_exact: bool) -> int:
        return 0 if is_exact else 1 + 2 * self.noisy


def position_differences(got_LD: Tensor, wanted_LD: Tensor) -> Tensor:
    """Norm of the difference over the norm of `wanted_LD`, per position, float32 [L].

    Positions of a norm below a tenth of the median count as of that. NaN or infinity on both sides is no difference
    (the harvest itself refuses it), on one side an infinite one.
    """
    got_LD, wanted_LD = got_LD.float(), wanted_LD.float()
    norm_L = wanted_LD.norm(dim=1)
    finite_L, got_finite_L = wanted_LD.isfinite().all(dim=1), got_LD.isfinite().all(dim=1)
    floor = norm_L[finite_L].median() / 10 if finite_L.any() else torch.ones((), device=norm_L.device)
    far_L = (got_LD - wanted_LD).norm(dim=1) / norm_L.clamp(min=max(floor.item(), 1e-30))
    far_L = torch.where(finite_L & got_finite_L, far_L, torch.inf)
    return torch.where(finite_L | got_finite_L, far_L, 0.0)


def _run_packed(
    model: PreTrainedModel, hooks: Sequence[Point], documents: Sequence[Tensor], batch: Sequence[Sequence[int]]
) -> dict[Point, Tensor]:
    """Activations [B, T, D] of the contexts that `batch` lists; shorter ones are padded as a document of their own."""
    width = max(sum(len(documents[number]) for number in numbers) for numbers in batch)
    device = documents[0].device
    tokens_BT = torch.zeros(len(batch), width, dtype=torch.int64, device=device)
    segments_BT = torch.full_like(tokens_BT, -1)
    for row, numbers in enumerate(batch):
        ids = torch.cat([documents[number] for number in numbers])
        lengths = torch.tensor([len(documents[number]) for number in numbers], device=device)
        tokens_BT[row, : len(ids)] = ids
        segments_BT[row, : len(ids)] = torch.repeat_interleave(torch.arange(len(numbers), device=device), lengths)
    inputs = packed_inputs(model, tokens_BT, segments_BT, isolated=True)
    return _forward(model, hooks, inputs, "on documents packed into one context, its forward fails")


def _run_alone(model: PreTrainedModel, hooks: Sequence[Point], ids_L: Tensor, copies: int = 1) -> dict[Point, Tensor]:
    inputs = {"input_ids": ids_L.expand(copies, -1), "use_cache": False}
    return _forward(model, hooks, inputs, "its forward fails on a single document")


def _forward(
    model: PreTrainedModel, hooks: Sequence[Point], inputs: dict[str, Any], failure: str
) -> dict[Point, Tensor]:
    try:
        with torch.no_grad(), capture(model, hooks) as captured:
            model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's code raises on inputs it was not written for
        raise GranaryError(f"{failure} ({type(error).__name__}: {first_line(error)})") from error
    missing = [str(hook) for hook in hooks if hook not in captured]
    if missing:
        raise GranaryError(f"its forward does not pass {missing[0]}")
    return dict(captured)
