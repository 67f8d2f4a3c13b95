"""Adam for an SAE: clip, project, update and renormalise in one pass over the rows."""

from typing import Any

import torch

from shared.errors import GranaryError
from shared.kernels import PairGradient, PairGradients, row_update
from shared.sae.model import SAE


class SAEAdam:
    """Adam (Kingma and Ba 2015) on all parameters of an SAE; decoder rows are kept at unit norm.

    ``step`` does, in this order: scale all gradients so that their joint norm is at most `clip_norm`; remove from each
    decoder row's gradient its component along the row; the Adam update; divide each decoder row by its norm.

    With `pair_gradients` the gradients of W_enc and W_dec are taken from the pairs they are sums over, and not from
    ``.grad``, which saves memory and time where nobody else has to see them: in a single process.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
    ) -> None:
        if not lr > 0:
            raise GranaryError(f"optim.lr={lr}: must be positive")
        if not all(0 <= beta < 1 for beta in betas):
            raise GranaryError(f"optim.betas={betas}: each must lie in [0, 1)")
        if clip_norm is not None and not clip_norm > 0:
            raise GranaryError(f"optim.clip_norm={clip_norm}: must be positive, or null for no clipping")
        self.parameters = dict(sae.named_parameters())
        self.kernels = sae.kernels
        self.pairs = PairGradients()
        if pair_gradients:
            self.pairs = sae.pair_gradients = PairGradients(W_enc=PairGradient(), W_dec=PairGradient())
        self.lr, self.betas, self.eps, self.clip_norm = lr, betas, eps, clip_norm
        self.num_steps = torch.zeros((), dtype=torch.int64)
        self.first = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.second = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.pairs.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
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
    def step(self, lr: float | None = None, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
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
        clip = torch.ones_like(grad_norm)
        if self.clip_norm is not None:
            clip = (self.clip_norm / grad_norm.clamp_min(torch.finfo(grad_norm.dtype).tiny)).clamp_max(1.0)
        for name, parameter in self.parameters.items():
            options: dict[str, Any] = {
                "clip": clip,
                "lr": lr,
                "betas": self.betas,
                "eps": self.eps,
                "step": int(self.num_steps),
                "unit_rows": name == "W_dec",
                "kernels": self.kernels,
            }
            pairs = self.pairs.get(name)
            if pairs:
                pairs.update(parameter, self.first[name], self.second[name], **options)
                continue
            shape = (-1, parameter.shape[-1])
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            row_update(
                parameter.view(shape),
                grad.contiguous().view(shape),
                self.first[name].view(shape),
                self.second[name].view(shape),
                **options,
            )
            parameter.grad = None
        return grad_norm

    def _merge_pairs(self) -> None:
        """Where a weight has a ``.grad`` too, by a loss that is not the SAE's own, add its pairs to that."""
        for name, gradient in self.pairs.items():
            grad = self.parameters[name].grad
            if gradient and grad is not None:
                grad += gradient.dense(self.parameters[name], self.kernels)
                gradient.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments and step count, keyed ``first.W_enc`` and so on."""
        state = {"num_steps": self.num_steps}
        for name in self.parameters:
            state[f"first.{name}"], state[f"second.{name}"] = self.first[name], self.second[name]
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put moments and step count back, in place."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise GranaryError(f"optimiser state does not match: {', '.join(sorted(own.keys() ^ state.keys()))}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
