"""Optimisers of a dictionary: each with its config in a file of its own, and the registry that knows them by name."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from shared.sae.optim.adam import Adam, AdamConfig
from shared.sae.optim.adam8bit import Adam8bit, Adam8bitConfig
from shared.sae.optim.base import Optimiser, OptimiserConfig, RowShare
from shared.sae.optim.muon import Muon, MuonConfig
from shared.sae.optim.signum import Signum, SignumConfig
from shared.sae.roles import Role

OPTIMISERS: dict[str, type[Optimiser]] = {
    optimiser.config_type.kind: optimiser for optimiser in (Adam, Adam8bit, Muon, Signum)
}


class Learner(Protocol):
    """What an optimiser is made for: a dictionary, or the rows of one that a process holds."""

    kernels: str

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors with a ``grad``."""
        ...

    def roles(self) -> Mapping[str, Role]:
        """What each of them is."""
        ...


def make_optimiser(
    learner: Learner, config: OptimiserConfig, *, rows: RowShare | None = None, pair_gradients: bool = False
) -> Optimiser:
    """The optimiser that `config` describes, of all parameters of `learner`.

    `rows` says which share of the rows it holds (None: all). With `pair_gradients` the caller hands the optimiser's
    ``pairs`` to the losses, which fill them. Raises GranaryError for an optimiser that needs another package, or other
    shapes.
    """
    return OPTIMISERS[config.kind](
        dict(learner.named_parameters()),
        learner.roles(),
        config,
        rows=rows,
        kernels=learner.kernels,
        pair_gradients=pair_gradients,
    )


__all__ = [
    "OPTIMISERS",
    "Adam",
    "Adam8bit",
    "Adam8bitConfig",
    "AdamConfig",
    "Learner",
    "Muon",
    "MuonConfig",
    "Optimiser",
    "OptimiserConfig",
    "RowShare",
    "Signum",
    "SignumConfig",
    "make_optimiser",
]
