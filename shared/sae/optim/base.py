"""What the optimisers of a dictionary share: clip, project, update, renormalise, each matrix in one pass over its rows.

Shapes: F rows (latents) held here, D columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.kernels import PairGradient, PairGradients
from shared.sae.roles import Rate, Role


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """What every optimiser is told. Fields are keys of the config group ``optim``, whose values are in ``conf/optim``.

    Raises GranaryError for a value out of its range.
    """

    kind: ClassVar[str]
    """Value of ``optim.kind`` that stands for it."""

    lr: float
    """Peak learning rate."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    decoder_factor: float = 1.0
    """Parameters of rate ``decoder`` learn at lr times this."""
    bias_factor: float = 1.0
    """Parameters of rate ``bias`` learn at lr times this."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise GranaryError(f"optim.lr={self.lr}: must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise GranaryError(f"optim.clip_norm={self.clip_norm}: must be positive, or null for no clipping")
        for key in ("decoder_factor", "bias_factor"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise GranaryError(f"optim.{key}={value}: it multiplies optim.lr and must be positive")

    def factor(self, rate: Rate) -> float:
        """What multiplies lr for parameters of this rate."""
        return {"encoder": 1.0, "decoder": self.decoder_factor, "bias": self.bias_factor}[rate]

    def check_decay(self, *keys: str) -> None:
        """Raise GranaryError unless these fields are decay rates."""
        for key in keys:
            if not 0 <= getattr(self, key) < 1:
                raise GranaryError(f"optim.{key}={getattr(self, key)}: must lie in [0, 1)")


def _keep(tensor: Tensor) -> None:
    """The sum over one process."""


@dataclass(frozen=True)
class RowShare:
    """Which share of each matrix's rows is held here, for an update that depends on all of them."""

    parts: int = 1
    """How many processes hold equally many rows of the same matrix, this one included."""
    sum_up: Callable[[Tensor], object] = _keep
    """Adds up, in place, what these processes found on their own rows."""
    over_columns: Callable[[Mapping[str, Tensor]], None] | None = None
    """Where the rows of unit norm are here in part: adds up, in place, what all processes found on theirs, [F] of each
    matrix by its name."""


class Optimiser:
    """What the optimisers share. ``step`` does, in this order: scale all gradients so that their joint norm is at most
    `clip_norm`; remove from the gradient of each row that has unit norm its component along the row; the update; divide
    each such row by its norm.

    What is done to a parameter is decided by its role alone, never by its name: ``rate`` picks the factor of its
    learning rate, ``unit_rows`` the projection, ``is_matrix`` the update of Muon and Adam8bit, and ``from_pairs``
    whether its gradient may be kept as the pairs it is a sum over (``pairs``) instead of in ``.grad``. That saves
    memory and time where nobody else has to see the gradient: in a single process.
    """

    config_type: ClassVar[type[OptimiserConfig]]
    kinds: ClassVar[tuple[str, ...]] = ("first", "second")
    """Names of the moments."""
    by_element: ClassVar[bool] = True
    """Whether an element's update does not depend on the others of its row, but for what unit norm asks."""

    config: OptimiserConfig

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        roles: Mapping[str, Role],
        config: OptimiserConfig,
        *,
        rows: RowShare | None = None,
        kernels: str = "auto",
        pair_gradients: bool = False,
    ) -> None:
        """`parameters` are tensors with a ``grad``, updated in their order; `roles` may name more than them.

        `rows` says which share of the rows they are (None: all). With `pair_gradients` the caller hands ``pairs`` to
        the losses, which fill it. Raises GranaryError for a parameter without a role.
        """
        self.parameters = dict(parameters)
        nameless = sorted(self.parameters.keys() - roles.keys())
        if nameless:
            raise GranaryError(f"no role is declared for {', '.join(nameless)}: a dictionary names all its parameters")
        self.roles = {name: roles[name] for name in self.parameters}
        self.config, self.rows, self.kernels = config, rows or RowShare(), kernels
        self.pairs = PairGradients()
        """The gradients that are kept as pairs, by the parameter's name."""
        if pair_gradients:
            self.pairs.update({name: PairGradient() for name, role in self.roles.items() if role.from_pairs})
        self.num_steps = torch.zeros((), dtype=torch.int64)
        self.step_number = 0
        """The same in host memory, within ``step``."""
        self.moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        for name, parameter in self.parameters.items():
            for kind in self.kinds:
                moment = self.new_moment(kind, name, parameter)
                if moment is not None:
                    self.moments[kind][name] = moment

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        """A parameter's moment of this kind at the start; None where it has none."""
        return torch.zeros_like(parameter)

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        """Change `weight` [F, D] (a vector is one row) in place; `grad` is scratch afterwards."""
        raise NotImplementedError

    def update_from_pairs(
        self, name: str, weight: Tensor, pairs: PairGradient, *, clip: Tensor, lr: float, unit_rows: bool
    ) -> None:
        """``update`` with a gradient kept as pairs, which are used up."""
        self.update(name, weight, pairs.dense(weight, self.kernels), clip=clip, lr=lr, unit_rows=unit_rows)
        pairs.clear()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.pairs.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a scalar tensor on their device."""
        self._merge_pairs()
        norms = [p.grad.norm() for p in self.parameters.values() if p.grad is not None]
        norms += [
            gradient.squared_norm(self.parameters[name], kernels=self.kernels).sqrt()
            for name, gradient in self.pairs.items()
            if gradient
        ]
        if not norms:
            raise GranaryError("an optimiser's step before backward: there is no gradient")
        return torch.stack(norms).norm()

    @torch.no_grad()
    def step(self, lr: float | None = None, grad_norm: Tensor | None = None) -> Tensor:
        """Update every parameter from its ``.grad``; returns the gradient norm before clipping, a scalar tensor.

        `lr` overrides the config's, for schedules. `grad_norm` is the norm over all ranks where the gradients are
        sharded; None computes it here. A parameter without a gradient counts as one with gradient 0. The gradients
        are used up: every ``.grad`` is None afterwards.
        """
        lr = self.config.lr if lr is None else lr
        if grad_norm is None:
            grad_norm = self.grad_norm()
        self._merge_pairs()
        self.num_steps += 1
        self.step_number = int(self.num_steps)
        clip = torch.ones_like(grad_norm)
        if self.config.clip_norm is not None:
            tiny = torch.finfo(grad_norm.dtype).tiny
            clip = (self.config.clip_norm / grad_norm.clamp_min(tiny)).clamp_max(1.0)
        in_parts = self._rows_in_parts()
        self._project_parts(in_parts)
        for name, parameter in self.parameters.items():
            role = self.roles[name]
            rate, unit_rows = lr * self.config.factor(role.rate), role.unit_rows and name not in in_parts
            pairs = self.pairs.get(name)
            if pairs:
                self.update_from_pairs(name, parameter, pairs, clip=clip, lr=rate, unit_rows=unit_rows)
                continue
            shape = (-1, parameter.shape[-1])
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            weight, grad = parameter.view(shape), grad.contiguous().view(shape)
            self.update(name, weight, grad, clip=clip, lr=rate, unit_rows=unit_rows)
            parameter.grad = None
        self._renormalise_parts(in_parts)
        return grad_norm

    def _rows_in_parts(self) -> list[str]:
        """Matrices whose rows have unit norm and are here in part."""
        if self.rows.over_columns is None:
            return []
        return [name for name, role in self.roles.items() if role.unit_rows]

    def _project_parts(self, names: list[str]) -> None:
        """``project``, for rows of which other processes hold the rest."""
        if self.rows.over_columns is None or not names:
            return
        along = {}
        for name in names:
            weight = self.parameters[name]
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            along[name] = torch.einsum("fd,fd->f", weight.grad, weight)
        self.rows.over_columns(along)
        for name, along_F in along.items():
            grad = self.parameters[name].grad
            assert grad is not None
            grad.addcmul_(along_F[:, None], self.parameters[name], value=-1)

    def _renormalise_parts(self, names: list[str]) -> None:
        """``renormalise``, likewise."""
        if self.rows.over_columns is None or not names:
            return
        squares = {name: torch.linalg.vector_norm(self.parameters[name], dim=1).square() for name in names}
        self.rows.over_columns(squares)
        for name, square_F in squares.items():
            self.parameters[name].div_(square_F.sqrt()[:, None])

    def _merge_pairs(self) -> None:
        """Where a weight has a ``.grad`` too, by a dense loss or somebody's own, add its pairs to that."""
        for name, gradient in self.pairs.items():
            grad = self.parameters[name].grad
            if gradient and grad is not None:
                grad += gradient.dense(self.parameters[name], self.kernels)
                gradient.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step count, keyed ``first.W_enc`` and so on."""
        state = {"num_steps": self.num_steps}
        for name in self.parameters:
            state |= {f"{kind}.{name}": moments[name] for kind, moments in self.moments.items() if name in moments}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put moments and step count back, in place."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise GranaryError(f"optimiser state does not match: {', '.join(sorted(own.keys() ^ state.keys()))}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def moment(self, kind: str, name: str) -> Tensor:
        """A moment as the rows of its parameter."""
        moment = self.moments[kind][name]
        return moment.view(-1, moment.shape[-1])


def project(grad: Tensor, weight: Tensor, unit_rows: bool) -> Tensor:
    """Remove from a gradient each row's component along the weight's row, which has unit norm."""
    return grad - (grad * weight).sum(1, keepdim=True) * weight if unit_rows else grad


def renormalise(weight: Tensor, unit_rows: bool) -> None:
    """Divide each row by its norm, in place."""
    if unit_rows:
        weight.div_(weight.norm(dim=1, keepdim=True))
