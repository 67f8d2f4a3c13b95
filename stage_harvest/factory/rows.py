"""The rows of a shard, made by running the model on the batches that they come from.

A batch is run whole, whichever part of it a shard holds, so a shard has the same bytes whoever makes it and however
often. Legend: N rows of a batch, T positions of a context, D features of a site.
"""

import bisect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.modulepoint import site_of
from stage_harvest.factory.made import digest_of
from stage_harvest.factory.survey import Survey, run


class BatchForward:
    """Runs batches in their order and cuts shards out of what they give."""

    def __init__(self, survey: Survey) -> None:
        """`survey` has been through all batches."""
        self.survey = survey
        self._iterator: Iterator[Any] = iter(())
        self._next = len(survey.batches)
        """Number of the batch that the iterator gives next."""
        self._rows: tuple[int, dict[str, Tensor]] = (-1, {})
        """Number and rows of the batch that ran last, which the next shard may begin in."""

    def fill(self, contexts: range, out: dict[str, Tensor], progress: Callable[[int], None]) -> None:
        """Fill ``out[site]`` [contexts, T, D] on the CPU, zeros behind the last row."""
        seq_len, survey = self.survey.seq_len, self.survey
        start, stop = contexts.start * seq_len, min(contexts.stop * seq_len, survey.num_rows)
        flat = {site: tensor[: len(contexts)].flatten(0, 1) for site, tensor in out.items()}
        done, at = 0, start
        number = bisect.bisect_right(survey.batches, start, key=lambda batch: batch.first + batch.count)
        while at < stop:
            batch = survey.batches[number]
            high = min(stop, batch.first + batch.count)
            if at < high:
                for site, rows_ND in self._rows_of(number).items():
                    flat[site][at - start : high - start] = rows_ND[at - batch.first : high - batch.first]
                progress((high - start) // seq_len - done)
                done, at = (high - start) // seq_len, high
            number += 1
        for tensor in flat.values():
            tensor[stop - start :] = 0
        progress(len(contexts) - done)

    def _rows_of(self, number: int) -> dict[str, Tensor]:
        """Rows [N, D] at each site, on the CPU."""
        if self._rows[0] == number:
            return self._rows[1]
        survey, saes = self.survey, self.survey.saes
        run(saes, self._batch(number), survey.made.told)
        rows = {}
        for name, point in saes.places.items():
            found = torch.cat([one.flatten(0, -2) for one in saes.activations(name)])
            if len(found) != survey.batches[number].count:
                raise GranaryError(
                    f"{name} gave {len(found)} rows for batch {number}, and {survey.batches[number].count} for one of"
                    " the same shapes: a store needs numbers of rows that follow from shapes; granary.fit does not"
                )
            rows[site_of(point)] = found.cpu()
        self._rows = (number, rows)
        return rows

    def _batch(self, number: int) -> Any:
        """The batch of this number, the same as the survey met. Raises GranaryError for another one."""
        if number < self._next:
            self._iterator, self._next = self.survey.made.iterate(self.survey.seed), 0
        for batch in self._iterator:
            self._next += 1
            if self._next > number:
                if digest_of(batch) == self.survey.batches[number].digest:
                    return batch
                break
        raise GranaryError(
            f"batch {number} of {self.survey.made.told} is not what it was when the batches were counted: they must be"
            " the same, in the same order, each time that they are made from a seed"
        )
