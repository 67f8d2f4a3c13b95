"""The dead latents' rows, and the ranks that hold them."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class DeadRows:
    """The dead latents that are held here, R of them, and how many there are in all."""

    W_enc_RD: torch.Tensor
    b_enc_R: torch.Tensor
    W_dec_RD: torch.Tensor
    count: int
    """Those of all ranks together."""

    @classmethod
    def alone(cls, W_enc_RD: torch.Tensor, b_enc_R: torch.Tensor, W_dec_RD: torch.Tensor) -> Self:
        """All of them are here."""
        return cls(W_enc_RD, b_enc_R, W_dec_RD, W_enc_RD.shape[0])


class LatentRanks:
    """The ranks that hold the latents among them, all with the same rows of a batch: here, one."""

    def sum_forward(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of each rank's part, for a loss that all then compute alike: gradients pass as they are."""
        return partial

    def kth_largest(self, values_NR: torch.Tensor, k: int) -> torch.Tensor:
        """The k-th largest of each row over all of them: [N, 1]. There are at least k."""
        return values_NR.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


ALONE = LatentRanks()
