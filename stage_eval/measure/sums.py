"""Mergeable float64 sums: what every metric is computed from, after the sums of all ranks have been added.

Legend: N tokens, D width of what is written, F d_latent, K kept latents of a token, C evaluated contexts, G groups of a
breakdown.

Squared deviations are taken from a fixed vector close to the mean (the store's training mean), which makes a single
pass safe: sum (x - m)^2 - N (mean - m)^2 cancels nothing, whereas sum x^2 - N mean^2 loses digits in LLaMA's few huge
dimensions. The results do not depend on that vector.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shared.kernels import add_at
from shared.parallel import all_reduce_max, all_reduce_sum

# Columns of the per-context table of reconstruction sums.
CONTEXT_FIELDS = (
    "tokens",  # number of evaluated tokens
    "error",  # sum |x - x_hat|^2
    "energy",  # sum |x|^2
    "spread",  # sum |x - m|^2, m the fixed vector
    "cosine",  # sum cos(x, x_hat)
    "norm_ratio",  # sum |x_hat| / |x|
    "overlap",  # sum x . x_hat
    "energy_hat",  # sum |x_hat|^2
    "l0",  # number of nonzero latents
    "l1",  # sum of latents
)


class Sums:
    """Named tensors that add (`added`) or take the maximum (`maxed`) over batches and over ranks."""

    def __init__(self) -> None:
        self.added: dict[str, Tensor] = {}
        self.maxed: dict[str, Tensor] = {}

    def all_reduce(self) -> None:
        """Make every rank hold the sums over all ranks."""
        for tensor in self.added.values():
            all_reduce_sum(tensor)
        for tensor in self.maxed.values():
            all_reduce_max(tensor)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the data."""
        for name, tensor in other.added.items():
            self.added[name] += tensor
        for name, tensor in other.maxed.items():
            torch.maximum(self.maxed[name], tensor, out=self.maxed[name])

    def to_cpu(self) -> None:
        """Move the tensors to host memory, where results are computed."""
        for name, tensor in self.added.items():  # in place: their owner may hold the dictionary too
            self.added[name] = tensor.cpu()
        self.maxed = {name: tensor.cpu() for name, tensor in self.maxed.items()}


@dataclass(frozen=True)
class Rows:
    """Which context and which breakdown groups each of N tokens belongs to; int64 [N] each."""

    context_N: Tensor
    position_N: Tensor
    frequency_N: Tensor
    kind_N: Tensor | None = None
    """What the position holds (see shared.store.format.image_table); None for a store of text alone."""

    def part(self, chosen: slice) -> "Rows":
        """Those of some of the tokens."""
        kind_N = None if self.kind_N is None else self.kind_N[chosen]
        return Rows(self.context_N[chosen], self.position_N[chosen], self.frequency_N[chosen], kind_N)


class ReconstructionSums(Sums):
    """Sums over what a dictionary must produce, x [N, D], and what it makes of it.

    x is what an SAE reads, and what a transcoder is to write.
    """

    def __init__(
        self, *, contexts: int, d_latent: int, positions: int, frequencies: int, shift_D: Tensor, kinds: int = 0
    ) -> None:
        super().__init__()
        width = len(shift_D)
        device = shift_D.device
        self.shift_D = shift_D.double()

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.added = {
            "context": zeros(contexts, len(CONTEXT_FIELDS)),
            "deviation_D": zeros(width),
            "spread_D": zeros(width),
            "error_D": zeros(width),
            "residual_D": zeros(width),
            # [G, 3]: tokens, error, spread
            "position": zeros(positions, 3),
            "frequency": zeros(frequencies, 3),
            # BOS positions, which no other sum contains: tokens, error, energy, spread
            "bos": zeros(4),
            "bos_deviation_D": zeros(width),
            "firings_F": zeros(d_latent, dtype=torch.int64),
            "activation_F": zeros(d_latent),
            "activation_squared_F": zeros(d_latent),
        }
        if kinds:  # [G, 4]: tokens, error, spread, norm
            self.added |= {"kind": zeros(kinds, 4), "kind_deviation_D": zeros(kinds, width)}
        self.maxed = {"activation_max_F": zeros(d_latent)}

    def add(self, x_ND: Tensor, x_hat_ND: Tensor, values_NK: Tensor, indices_NK: Tensor, rows: Rows) -> None:
        """Add N evaluated tokens: targets, reconstructions (any float dtype) and their sparse latents."""
        x_ND, x_hat_ND = x_ND.double(), x_hat_ND.double()
        residual_ND = x_ND - x_hat_ND
        deviation_ND = x_ND - self.shift_D
        squared_error_ND = residual_ND.square()
        squared_deviation_ND = deviation_ND.square()
        error_N = squared_error_ND.sum(1)
        spread_N = squared_deviation_ND.sum(1)
        energy_N = x_ND.square().sum(1)
        energy_hat_N = x_hat_ND.square().sum(1)
        overlap_N = (x_ND * x_hat_ND).sum(1)
        norms_N = (energy_N * energy_hat_N).sqrt()
        fired_NK = (indices_NK >= 0) & (values_NK != 0)
        active_NK = torch.where(fired_NK, values_NK, 0).double()
        ones_N = torch.ones_like(error_N)
        columns = {
            "tokens": ones_N,
            "error": error_N,
            "energy": energy_N,
            "spread": spread_N,
            "cosine": torch.where(norms_N > 0, overlap_N / norms_N.clamp_min(1e-300), 0),
            "norm_ratio": torch.where(energy_N > 0, (energy_hat_N / energy_N.clamp_min(1e-300)).sqrt(), 0),
            "overlap": overlap_N,
            "energy_hat": energy_hat_N,
            "l0": fired_NK.sum(1).double(),
            "l1": active_NK.sum(1),
        }
        add_at(self.added["context"], rows.context_N, torch.stack([columns[name] for name in CONTEXT_FIELDS], 1))
        self.added["deviation_D"] += deviation_ND.sum(0)
        self.added["spread_D"] += squared_deviation_ND.sum(0)
        self.added["error_D"] += squared_error_ND.sum(0)
        self.added["residual_D"] += residual_ND.sum(0)
        grouped_N3 = torch.stack([ones_N, error_N, spread_N], 1)
        add_at(self.added["position"], rows.position_N, grouped_N3)
        add_at(self.added["frequency"], rows.frequency_N, grouped_N3)
        if rows.kind_N is not None:
            add_at(self.added["kind"], rows.kind_N, torch.stack([ones_N, error_N, spread_N, energy_N.sqrt()], 1))
            add_at(self.added["kind_deviation_D"], rows.kind_N, deviation_ND)
        self._add_latents(active_NK[fired_NK], indices_NK[fired_NK])

    def add_bos(self, x_ND: Tensor, x_hat_ND: Tensor) -> None:
        """Add BOS positions, which are reported apart: their norms are unlike any other token's."""
        x_ND = x_ND.double()
        deviation_ND = x_ND - self.shift_D
        sums = (
            (x_ND - x_hat_ND.double()).square().sum(),
            x_ND.square().sum(),
            deviation_ND.square().sum(),
        )
        self.added["bos"] += torch.stack([torch.full_like(sums[0], len(x_ND)), *sums])
        self.added["bos_deviation_D"] += deviation_ND.sum(0)

    def _add_latents(self, values_M: Tensor, indices_M: Tensor) -> None:
        add_at(self.added["firings_F"], indices_M, torch.ones_like(indices_M))
        add_at(self.added["activation_F"], indices_M, values_M)
        add_at(self.added["activation_squared_F"], indices_M, values_M.square())
        self.maxed["activation_max_F"].scatter_reduce_(0, indices_M, values_M, "amax")
