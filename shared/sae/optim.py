"""Optimisers for an SAE: clip, project, update and renormalise, each matrix in one pass over its rows.

Shapes: F rows (latents) held here, D d_model.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from shared.errors import GranaryError
from shared.kernels import AdamStep, PairGradient, PairGradients, row_update
from shared.sae.config import SAEConfig


class Trained(Protocol):
    """What an optimiser sees of an SAE."""

    config: SAEConfig
    kernels: str
    pair_gradients: PairGradients | None

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors with a ``grad``."""
        ...


class SAEOptimiser:
    """What the optimisers share. ``step`` does, in this order: scale all gradients so that their joint norm is at most
    `clip_norm`; remove from each decoder row's gradient its component along the row; the update; divide each decoder
    row by its norm. The two about rows are left out where the config frees the decoder's norms.

    A parameter named in `factors` learns at lr times its factor.

    With `pair_gradients` the gradients of W_enc and W_dec are taken from the pairs they are sums over, and not from
    ``.grad``, which saves memory and time where nobody else has to see them: in a single process.
    """

    kinds: ClassVar[tuple[str, ...]] = ("first", "second")
    """Names of the moments."""

    def __init__(
        self,
        sae: Trained,
        lr: float,
        *,
        factors: Mapping[str, float] | None = None,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
    ) -> None:
        if not lr > 0:
            raise GranaryError(f"optim.lr={lr}: must be positive")
        if clip_norm is not None and not clip_norm > 0:
            raise GranaryError(f"optim.clip_norm={clip_norm}: must be positive, or null for no clipping")
        self.lr, self.factors, self.clip_norm = lr, dict(factors or {}), clip_norm
        self.parameters = dict(sae.named_parameters())
        for name, factor in self.factors.items():
            if name not in self.parameters or not factor > 0:
                raise GranaryError(f"factors[{name!r}]={factor}: a positive number for {', '.join(self.parameters)}")
        self.kernels = sae.kernels
        self.unit_norm_decoder = sae.config.unit_norm_decoder
        self.pairs = PairGradients()
        if pair_gradients:
            self.pairs = sae.pair_gradients = PairGradients(W_enc=PairGradient(), W_dec=PairGradient())
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
            raise GranaryError("SAEAdam.step before backward: there is no gradient")
        return torch.stack(norms).norm()

    @torch.no_grad()
    def step(self, lr: float | None = None, grad_norm: Tensor | None = None) -> Tensor:
        """Update every parameter from its ``.grad``; returns the gradient norm before clipping, a scalar tensor.

        `lr` overrides the constructor's, for schedules. `grad_norm` is the norm over all ranks where the gradients are
        sharded; None computes it here. A parameter without a gradient counts as one with gradient 0. The gradients
        are used up: every ``.grad`` is None afterwards.
        """
        lr = self.lr if lr is None else lr
        if grad_norm is None:
            grad_norm = self.grad_norm()
        self._merge_pairs()
        self.num_steps += 1
        self.step_number = int(self.num_steps)
        clip = torch.ones_like(grad_norm)
        if self.clip_norm is not None:
            clip = (self.clip_norm / grad_norm.clamp_min(torch.finfo(grad_norm.dtype).tiny)).clamp_max(1.0)
        for name, parameter in self.parameters.items():
            rate = lr * self.factors.get(name, 1.0)
            unit_rows = name == "W_dec" and self.unit_norm_decoder
            pairs = self.pairs.get(name)
            if pairs:
                self.update_from_pairs(name, parameter, pairs, clip=clip, lr=rate, unit_rows=unit_rows)
                continue
            shape = (-1, parameter.shape[-1])
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            weight, grad = parameter.view(shape), grad.contiguous().view(shape)
            self.update(name, weight, grad, clip=clip, lr=rate, unit_rows=unit_rows)
            parameter.grad = None
        return grad_norm

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


def check_betas(betas: tuple[float, float]) -> None:
    """Raise GranaryError unless both are decay rates."""
    if not all(0 <= beta < 1 for beta in betas):
        raise GranaryError(f"optim.betas={betas}: each must lie in [0, 1)")


class SAEAdam(SAEOptimiser):
    """Adam (Kingma and Ba 2015) on all parameters of an SAE.

    Moments may be kept in bfloat16, which halves their memory: they are rounded to it stochastically, since a second
    moment that changes by a thousandth per step would never leave its nearest bfloat16.
    """

    def __init__(
        self,
        sae: Trained,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        factors: Mapping[str, float] | None = None,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
        moments: str = "float32",
    ) -> None:
        """`moments` is float32 (the parameters' own type) or bfloat16."""
        check_betas(betas)
        if moments not in ("float32", "bfloat16"):
            raise GranaryError(f"optim.moments={moments!r}: choose from float32, bfloat16")
        self.half = moments == "bfloat16"
        super().__init__(sae, lr, factors=factors, clip_norm=clip_norm, pair_gradients=pair_gradients)
        self.betas, self.eps = betas, eps

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        return torch.zeros_like(parameter, dtype=torch.bfloat16 if self.half else parameter.dtype)

    def update_from_pairs(
        self, name: str, weight: Tensor, pairs: PairGradient, *, clip: Tensor, lr: float, unit_rows: bool
    ) -> None:
        if self.half:
            super().update_from_pairs(name, weight, pairs, clip=clip, lr=lr, unit_rows=unit_rows)
            return
        pairs.update(
            weight,
            self.moments["first"][name],
            self.moments["second"][name],
            self.adam_step(clip, lr, unit_rows),
            kernels=self.kernels,
        )

    def adam_step(self, clip: Tensor, lr: float, unit_rows: bool) -> AdamStep:
        """This step, for one parameter."""
        return AdamStep(lr, self.betas, self.eps, self.step_number, clip, unit_rows)

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first, second = self.moment("first", name), self.moment("second", name)
        # In tiles, so that no float32 copy of the moments exists.
        rows = max(1, TILE_ELEMENTS // weight.shape[1]) if self.half else max(1, len(weight))
        generator = None
        if self.half:
            generator = torch.Generator(weight.device).manual_seed(self.step_number)
        for start in range(0, len(weight), rows):
            tile = slice(start, start + rows)
            moments = [moment[tile].to(weight.dtype) if self.half else moment[tile] for moment in (first, second)]
            adam = self.adam_step(clip, lr, unit_rows)
            row_update(weight[tile], grad[tile], moments[0], moments[1], adam, kernels=self.kernels)
            if self.half:
                for kept, moment in zip((first, second), moments, strict=True):
                    kept[tile] = round_stochastically(moment, generator)


class SAESignum(SAEOptimiser):
    """The sign of the momentum (Bernstein et al. 2018): every entry moves by lr."""

    kinds = ("first",)

    def __init__(
        self,
        sae: Trained,
        lr: float,
        *,
        momentum: float = 0.9,
        factors: Mapping[str, float] | None = None,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
    ) -> None:
        check_betas((momentum, 0.0))
        super().__init__(sae, lr, factors=factors, clip_norm=clip_norm, pair_gradients=pair_gradients)
        self.momentum = momentum

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first = self.moment("first", name)
        first.lerp_(project(grad * clip, weight, unit_rows), 1 - self.momentum)
        weight.sub_(first.sign(), alpha=lr)
        renormalise(weight, unit_rows)


class SAEMuon(SAEOptimiser):
    """Muon (Jordan et al. 2024) on the two matrices, Adam on the vectors.

    The momentum's singular values are brought near 1 by Newton-Schulz steps on its D x D Gram matrix, a sum over rows:
    shards of rows add theirs up. lr is scaled by ``0.2 sqrt(max(F, D))``, which gives the updates Adam's size (Liu et
    al. 2025), so that Adam's rates fit.
    """

    # Quintic coefficients that rise fast and end near 1.
    coefficients = (3.4445, -4.7750, 2.0315)

    def __init__(
        self,
        sae: Trained,
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        factors: Mapping[str, float] | None = None,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
    ) -> None:
        check_betas(betas)
        check_betas((momentum, 0.0))
        super().__init__(sae, lr, factors=factors, clip_norm=clip_norm, pair_gradients=pair_gradients)
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.betas, self.eps = betas, eps
        self.num_latents = sae.config.d_latent
        self.sum_rows: Callable[[Tensor], object] = lambda tensor: None
        """Sums in place over the ranks that hold other rows; a layout that cuts rows sets it."""

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        return torch.zeros_like(parameter) if kind == "first" or name not in MATRICES else None

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first = self.moment("first", name)
        if name not in MATRICES:
            adam = AdamStep(lr, self.betas, self.eps, self.step_number, clip, unit_rows=False)
            row_update(weight, grad, first, self.moment("second", name), adam, kernels=self.kernels)
            return
        grad = project(grad * clip, weight, unit_rows)
        first.lerp_(grad, 1 - self.momentum)
        direction = self.orthogonalise(grad.lerp(first, self.momentum) if self.nesterov else first)
        weight.sub_(direction, alpha=lr * 0.2 * max(self.num_latents, weight.shape[1]) ** 0.5)
        renormalise(weight, unit_rows)

    def orthogonalise(self, matrix_FD: Tensor) -> Tensor:
        """The matrix with its singular values near 1; F counts the rows of all ranks."""
        a, b, c = self.coefficients
        square = matrix_FD.square().sum()
        self.sum_rows(square)
        matrix_FD = matrix_FD / (square.sqrt() + 1e-7)
        for _ in range(self.ns_steps):
            gram_DD = matrix_FD.T @ matrix_FD
            self.sum_rows(gram_DD)
            matrix_FD = a * matrix_FD + matrix_FD @ (b * gram_DD + c * gram_DD @ gram_DD)
        return matrix_FD


MATRICES = frozenset({"W_enc", "W_dec"})
# Elements of a tile whose bfloat16 moments are in float32 at a time.
TILE_ELEMENTS = 1 << 20


def project(grad: Tensor, weight: Tensor, unit_rows: bool) -> Tensor:
    """Without each row's component along the weight's row, which has unit norm."""
    return grad - (grad * weight).sum(1, keepdim=True) * weight if unit_rows else grad


def renormalise(weight: Tensor, unit_rows: bool) -> None:
    """Divide each row by its norm, in place."""
    if unit_rows:
        weight.div_(weight.norm(dim=1, keepdim=True))


def round_stochastically(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """float32 to one of the two nearest bfloat16, which is right on average."""
    bits = values.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
