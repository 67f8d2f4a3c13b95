"""The rows that a model gives, forward after forward, at the places where SAEs are attached to it.

Shape letters: N rows of one forward, D the width of a place.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.intervene.attach import Attached
from shared.lm.early_end import may_end_early


class ModelRows:
    """Runs the model on a user's batches; endless where those can be gone through again."""

    def __init__(self, saes: Attached, names: Iterable[str], batches: Iterable[Any], *, skip: int = 0) -> None:
        """`names` are the places that are wanted; the first `skip` batches are passed over, unlooked at."""
        self.saes, self.names, self.batches = saes, tuple(names), batches
        self.drawn = 0
        """Batches taken so far, over all passes."""
        self.passes = 0
        """Passes that have ended."""
        self._iterator = iter(batches)
        self._rows_in_pass = 0
        self._ends_early: bool | None = None
        """Whether forwards end behind the last place; None before the first."""
        while self.drawn < skip and self._next() is not None:
            self._rows_in_pass = 1  # it is not known what they would have given

    def next(self) -> dict[str, Tensor] | None:
        """[N, D] for each place of the next batch, without gradient; None when the batches have ended.

        Raises GranaryError where a module did not run, for a batch that the model can't be called with, and where a
        whole pass gives no row.
        """
        while (batch := self._next()) is not None:
            self._run(batch[0])
            rows = {name: self.saes.rows(name) for name in self.names}
            self._rows_in_pass += max(len(rows_ND) for rows_ND in rows.values())
            return rows
        return None

    @torch.no_grad()
    def _run(self, batch: Any) -> None:
        """A forward: the first to its end, later ones as far as the last place where that is safe."""
        saes = self.saes
        if self._ends_early and saes.run_as_far(self.names, lambda: saes.call(batch)):
            return
        saes.call(batch)  # a whole one, and from here on all are, unless it was the first
        ran_once = all(len(saes.activations(name)) == 1 for name in self.names)
        is_bare = getattr(saes.model, "_orig_mod", saes.model) is saes.inner
        self._ends_early = self._ends_early is None and ran_once and is_bare and may_end_early(saes.inner)

    def _next(self) -> tuple[Any] | None:
        """The next batch, in a pass of its own where the last has ended."""
        for _ in range(2):
            for batch in self._iterator:
                self.drawn += 1
                return (batch,)
            if self.batches is self._iterator:  # an iterator is gone through once
                return None
            if not self._rows_in_pass:
                raise GranaryError("the batches gave no row to train on in a whole pass: are they empty?")
            self.passes += 1
            self._iterator, self._rows_in_pass = iter(self.batches), 0
        raise GranaryError("the batches are empty the second time: give a list or a DataLoader, or an iterator")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context no dropout acts and no running statistics change; then each module is as it was."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training
