"""The drawn tokens of one pair of sites with all that does not depend on the dictionary: halves, documents, probes."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shared.text.documents import Ints, Marks
from stage_eval.supervised.logistic import Probe, fit
from stage_eval.supervised.resamples import Resamples
from stage_eval.supervised.sample import Sample, Task


@dataclass(frozen=True)
class Rows:
    """The tokens of a task in both halves."""

    fitted: Ints
    tested: Ints


@dataclass
class Material:
    """What every score of every dictionary of these sites reads."""

    sample: Sample
    x_ND: Tensor
    """Activations that are read."""
    y_ND: Tensor
    """Activations that are written; of an autoencoder the same tensor."""
    seed: int
    device: torch.device
    """Where probes are fitted."""
    _probes: dict[tuple[str, str, bool], Probe] = field(default_factory=dict)

    @cached_property
    def fitted(self) -> Resamples:
        """Resamples of the documents that probes are fitted on."""
        return Resamples(self.sample.documents[0], self.seed)

    @cached_property
    def tested(self) -> Resamples:
        """Resamples of the documents that figures are of."""
        return Resamples(self.sample.documents[1], self.seed)

    def rows(self, task: Task) -> Rows:
        """Those of both halves."""
        return Rows(task.rows(~self.sample.is_test_N), task.rows(self.sample.is_test_N))

    def probe(self, task: Task, *yes: str, among: Marks | None = None, written: bool = True) -> Probe:
        """A probe on whole activations that tells these groups of a task from its others, made once.

        `among`: of the fitting half's tokens, those that it sees; `written`: on what is written, not on what is read.
        """
        name = (task.name, ", ".join(yes) + ("" if among is None else " biased"), written)
        if name not in self._probes:
            rows = task.rows(~self.sample.is_test_N & (True if among is None else among))
            x_nD = (self.y_ND if written else self.x_ND)[torch.from_numpy(rows)].to(self.device)
            found = fit(x_nD, torch.from_numpy(task.of(*yes)[rows]).to(self.device))
            self._probes[name] = Probe(found.weight_D.cpu(), found.bias)
        return self._probes[name]

    def logits(self, probe: Probe, rows: Ints, *, written: bool = True) -> np.ndarray:
        """Log odds of a probe on whole activations, float64 [n]."""
        found: np.ndarray = probe.logits((self.y_ND if written else self.x_ND)[torch.from_numpy(rows)]).numpy()
        return found
