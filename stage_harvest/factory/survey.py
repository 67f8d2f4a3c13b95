"""One pass over a factory's batches before anything is written: which rows each will give, and what tells it apart.

The model runs once for each kind of batch (shapes and types of its arguments) that has not been seen: how many rows it
gives is taken to follow from that, and checked when the rows are made.

An activation [B, ..., D] is B examples, each a row of features for every index between; one [N, D] is N examples of a
row each. Examples follow one another through the contexts, so that each is full but the last. Of a row the store's
``tokens`` hold the token, or its number within its example where there are none, ``segments`` the example within the
context.

Legend: N rows of a batch, T positions of a context.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.intervene.attach import Attached
from shared.intervene.tokens import of_rows, real_tokens
from shared.lm.calls import Masked, arguments_of
from shared.lm.modulepoint import site_of
from stage_harvest.factory.made import Made, digest_of, telling_where
from stage_harvest.tokens.packing import PADDING_SEGMENT, Context

Shapes = dict[str, tuple[torch.Size, ...]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchRows:
    """A batch as the survey met it."""

    first: int
    """Number of its first row among the rows of all batches."""
    count: int
    digest: bytes


class Survey:
    """What is known of the batches; filled by going through `contexts` once."""

    def __init__(self, made: Made, saes: Attached, *, seed: int, seq_len: int, limit: int | None) -> None:
        """`saes` marks the places; `limit` is the most contexts that are wanted, None: all that the batches fill."""
        self.made, self.saes, self.seed, self.seq_len, self.limit = made, saes, seed, seq_len, limit
        self.batches: list[BatchRows] = []
        self.widths: dict[str, int] = {}
        """Features of each site, by its name in the store."""
        self.examples = 0
        self._shapes: dict[str, Shapes] = {}

    @property
    def num_rows(self) -> int:
        return self.batches[-1].first + self.batches[-1].count if self.batches else 0

    @property
    def num_contexts(self) -> int:
        """Contexts that the rows fill, the last perhaps in part, at most as many as were asked for."""
        filled = math.ceil(self.num_rows / self.seq_len)
        return filled if self.limit is None else min(filled, self.limit)

    def fingerprint(self) -> str:
        """SHA-256 of the batches in their order."""
        return hashlib.sha256(b"".join(one.digest for one in self.batches)).hexdigest()

    def contexts(self) -> Iterator[Context]:
        """The contexts that the rows of the batches fill, one after the other."""
        return itertools.islice(self._all_contexts(), self.limit)

    def _all_contexts(self) -> Iterator[Context]:
        T = self.seq_len
        held = _Rows.none()
        for batch in self.made.iterate(self.seed):
            held = held.followed_by(self._next(batch))
            whole = len(held) // T
            for number in range(whole):
                yield held.context(number * T, T)
            held = held.part(whole * T)
        if len(held):
            yield held.context(0, T)

    def _next(self, batch: Any) -> "_Rows":
        """Take note of a batch, and say what its rows are."""
        shapes = self._shapes_of(batch)
        counts = {site: sum(math.prod(shape[:-1]) for shape in found) for site, found in shapes.items()}
        count = next(iter(counts.values()))
        if any(other != count for other in counts.values()):
            told = ", ".join(f"{site} {number}" for site, number in counts.items())
            raise GranaryError(
                f"batch {len(self.batches)} gives {told} rows, and those of one store belong together: harvest places"
                " of different numbers of rows into stores of their own"
            )
        found = max(shapes.values(), key=lambda one: max(map(_length, one)))
        lengths = np.concatenate([np.full(_examples(shape), _length(shape)) for shape in found])
        rows = _Rows.of(lengths, self.made.tokens_of(batch), self._mask(batch, shapes, count), self.examples)
        self.batches.append(BatchRows(self.num_rows, count, digest_of(batch)))
        self.examples += len(lengths)
        return rows

    def _shapes_of(self, batch: Any) -> Shapes:
        """Shapes of the activations at every place, by the name of its site; one for each time that it ran."""
        kind = signature(batch)
        if kind not in self._shapes:
            self._shapes[kind] = shapes_at(self.saes, batch, self.made.told)
            widths = {site: found[0][-1] for site, found in self._shapes[kind].items()}
            if self.widths and widths != self.widths:
                raise GranaryError(
                    f"batch {len(self.batches)} gives activations of other widths than those before: {widths}, not"
                    f" {self.widths}"
                )
            self.widths = widths
        return self._shapes[kind]

    def _mask(self, batch: Any, shapes: Shapes, count: int) -> npt.NDArray[np.bool_]:
        """bool [N]: which rows count; those of a language model that are no padding, BOS or EOS, or the batch's own."""
        args, kwargs = arguments_of(batch)
        real = batch.mask if isinstance(batch, Masked) else real_tokens(self.saes.inner, args, kwargs)
        mask_N = np.ones(count, np.bool_)
        if real is None:
            return mask_N
        for found in shapes.values():
            parts = [of_rows(real.bool().cpu(), shape[:-1]) for shape in found]
            if all(part is not None for part in parts):
                mask_N &= torch.cat([part.reshape(-1) for part in parts if part is not None]).numpy()
            elif isinstance(batch, Masked):
                raise GranaryError(
                    f"the mask of batch {len(self.batches)} is {list(real.shape)}, and there are"
                    f" {list(found[0][:-1])} activations: one for each is needed"
                )
        return mask_N


@dataclass(frozen=True)
class _Rows:
    """Rows in a row: which example each is of, what stands for its token, and whether it counts."""

    example_N: Ints
    token_N: Ints
    mask_N: npt.NDArray[np.bool_]

    @classmethod
    def none(cls) -> "_Rows":
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_))

    @classmethod
    def of(cls, lengths: Ints, tokens: Tensor | None, mask_N: npt.NDArray[np.bool_], first_example: int) -> "_Rows":
        starts = np.cumsum(lengths) - lengths
        example_N = np.repeat(np.arange(len(lengths)), lengths)
        number_N = np.arange(lengths.sum()) - starts[example_N]
        token_N = number_N if tokens is None else tokens.reshape(-1).cpu().numpy()
        return cls(example_N + first_example, token_N, mask_N)

    def __len__(self) -> int:
        return len(self.mask_N)

    def followed_by(self, other: "_Rows") -> "_Rows":
        return _Rows(
            np.concatenate([self.example_N, other.example_N]),
            np.concatenate([self.token_N, other.token_N]),
            np.concatenate([self.mask_N, other.mask_N]),
        )

    def part(self, start: int, stop: int | None = None) -> "_Rows":
        return _Rows(self.example_N[start:stop], self.token_N[start:stop], self.mask_N[start:stop])

    def context(self, start: int, length: int) -> Context:
        """`length` positions from `start` on, padded where there are fewer."""
        part = self.part(start, start + length)
        found = len(part)
        tokens_T, segments_T = np.zeros(length, np.int32), np.full(length, PADDING_SEGMENT, np.int32)
        mask_T = np.zeros(length, np.bool_)
        tokens_T[:found], mask_T[:found] = part.token_N, part.mask_N
        segments_T[:found] = part.example_N - part.example_N[0]
        return Context(tokens_T, mask_T, segments_T)


def shapes_at(saes: Attached, batch: Any, told: str) -> Shapes:
    """What a forward gives at each place. GranaryError where that fails or a place is idle."""
    run(saes, batch, told)
    return {site_of(point): tuple(one.shape for one in saes.activations(name)) for name, point in saes.places.items()}


def run(saes: Attached, batch: Any, told: str) -> None:
    """The model's forward on a batch, without gradient."""
    with torch.no_grad(), telling_where(f"a forward of the model of {told}"):
        saes.call(batch)


def signature(batch: Any) -> str:
    """Structure of a batch with the type and shape of each tensor, and every value that is no tensor."""
    match batch:
        case Masked():
            return signature(batch.inputs)
        case Tensor() | np.ndarray():
            return f"{batch.dtype}{list(batch.shape)}"
        case Mapping():
            return "{" + ",".join(f"{key!r}:{signature(one)}" for key, one in batch.items()) + "}"
        case tuple() | list():
            return "(" + ",".join(map(signature, batch)) + ")"
        case _:
            return repr(batch)


def _examples(shape: torch.Size) -> int:
    return 1 if len(shape) == 1 else shape[0]


def _length(shape: torch.Size) -> int:
    """Rows of an example."""
    return math.prod(shape[1:-1])
