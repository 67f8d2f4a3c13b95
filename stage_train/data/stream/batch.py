"""What streams hand out, and what training asks of whatever hands it out.

Shape letters: N rows of this rank's batch, C contexts of it, T positions of a context, D a width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.sae.contexts import Contexts, Given
from shared.sae.sites import Sites, side_by_side


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's rows of one global batch."""

    activations: dict[str, Tensor]
    """[N, D] for every site, row i of all sites the same token; overwritten by the next call of the stream."""
    epoch: int
    index: int
    """Number of the batch within its epoch."""
    num_tokens: int
    """Rows of the global batch, all ranks together, those included that `skip_damaged` left out."""
    most_rows: int
    """Rows of the rank that has most, likewise."""

    def parts(self, sites: Sites, most: int | None) -> list[tuple[Given, Tensor]]:
        """What is read and what must be written, at most `most` rows at a time; one tensor where that is the same.

        Equally many on every rank, if empty ones: all of them take part in what the ranks do together.
        """
        number = -(-self.most_rows // (most or self.most_rows))
        x_ND, y_ND = sites.pick(self.activations)
        reads = torch.tensor_split(x_ND, number)
        writes = reads if y_ND is x_ND else torch.tensor_split(y_ND, number)
        return list(zip(reads, writes, strict=True))


@dataclass(frozen=True, slots=True)
class ContextBatch:
    """This rank's contexts of one global batch."""

    activations: dict[str, Tensor]
    """[C, T, D] for every site; overwritten by the next call of the stream."""
    documents_CT: Tensor
    """int64: the document of each position, numbered within its context; -1 for padding."""
    counts_CT: Tensor
    """bool: positions that are learnt from, on the CPU."""
    epoch: int
    index: int
    """Number of the batch within its epoch."""
    num_tokens: int
    """Positions of the global batch that are learnt from, those included that `skip_damaged` left out."""
    most_contexts: int
    """Contexts of the rank that has most, likewise."""

    def parts(self, sites: Sites, most: int | None) -> list[tuple[Given, Tensor]]:
        """What is read, whole contexts, and what must be written where they count, [N, D].

        At most `most` positions at a time, but one context at least; equally many parts on every rank.
        """
        length = self.counts_CT.shape[1]
        number = 1 if most is None else -(-self.most_contexts // max(1, most // length))
        cut = [tensor.tensor_split(number) for tensor in (self.documents_CT, self.counts_CT)]
        sides = [side_by_side(self.activations, names).tensor_split(number) for names in (sites.reads, sites.writes)]
        found: list[tuple[Given, Tensor]] = []
        for x_CTD, y_CTD, documents_CT, counts_CT in zip(*sides, *cut, strict=True):
            contexts = Contexts.of(x_CTD, documents_CT, counts_CT)
            found.append((contexts, contexts.counted(y_CTD)))
        return found


AnyBatch = Batch | ContextBatch


def whole_batch(activations: dict[str, Tensor], *, num_tokens: int) -> AnyBatch:
    """The first batch of the first rank, of rows [N, D], or of contexts [C, T, D], each one document that counts."""
    shape = next(iter(activations.values())).shape[:-1]
    if len(shape) == 1:
        return Batch(activations, 0, 0, num_tokens=num_tokens, most_rows=shape[0])
    # from numpy, so that they are known where tensors are only shapes
    documents_CT, counts_CT = (torch.from_numpy(np.full(shape, value)) for value in (0, True))
    return ContextBatch(activations, documents_CT, counts_CT, 0, 0, num_tokens=num_tokens, most_contexts=shape[0])


class BatchStream(Protocol):
    """What training asks of whatever hands out batches."""

    wait_seconds: float
    """Time spent waiting for rows since the stream was made."""
    skipped_tokens: int
    """Tokens that this rank has left out of the batches handed out since the stream was made."""
    skips_damaged: bool

    def __next__(self) -> AnyBatch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the same on every rank."""

    def ends_epoch(self, batch: AnyBatch) -> bool:
        """Whether `batch`, the last that was handed out, is its epoch's last."""

    def epochs_passed(self) -> int:
        """Epochs of which every batch has been handed out."""
