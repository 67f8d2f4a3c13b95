"""AuxK: dead latents reconstruct what the living ones leave over (Gao et al. 2024, A.2), on their rows alone.

There is no kernel of its own for a GPU: ``blocks`` is matrix products alone, the same on every device.
"""

from dataclasses import dataclass
from typing import Self

import torch

from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import resolve


@dataclass(frozen=True, slots=True)
class DeadRows:
    """The dead latents that are held here, R of them, and how many there are in all."""

    W_enc_RD: torch.Tensor
    b_enc_R: torch.Tensor
    W_dec_RD: torch.Tensor
    count: int
    """Those of all holders together."""

    @classmethod
    def alone(cls, W_enc_RD: torch.Tensor, b_enc_R: torch.Tensor, W_dec_RD: torch.Tensor) -> Self:
        """All of them are here."""
        return cls(W_enc_RD, b_enc_R, W_dec_RD, W_enc_RD.shape[0])


class Holders:
    """The processes that hold the dead latents among them, all with the same rows: here, one."""

    def sum_forward(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of each one's part, for a loss that all then compute alike: gradients pass as they are."""
        return partial

    def kth_largest(self, values_NR: torch.Tensor, k: int) -> torch.Tensor:
        """The k-th largest of each row over all of them: [N, 1]. There are at least k, none of them negative."""
        return values_NR.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


ALONE = Holders()


def auxk_error(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    dead: DeadRows,
    num_aux: int,
    *,
    compute: Compute = AUTO,
    holders: Holders = ALONE,
) -> torch.Tensor:
    """``mean_n |e_n - e_hat_n|^2 / |e_n|^2``, a scalar, with gradients for the dead latents' rows and biases only.

    e = `residual_ND` and `centred_ND` are taken as constants. e_hat decodes, without b_dec, the num_aux largest
    ReLU pre-activations of the dead latents (all of them where they are no more; at a tie, all that tie). R of them are
    here, maybe 0, and ``dead.count`` in all `holders` together.

    reference: autograd through the dense [N, R] activations. Else the gradient is computed with the value, in blocks of
    rows, so that memory does not grow with N x R; compute.dtype bfloat16 runs its matrix products in bfloat16.
    """
    arguments = (residual_ND.detach(), centred_ND.detach(), dead, num_aux, holders)
    if resolve(compute.kernels, residual_ND) == "reference":
        from shared.kernels.auxk import reference

        return reference.auxk_error(*arguments)
    from shared.kernels.auxk import blocks

    return blocks.auxk_error(*arguments, compute.dtype_for(residual_ND))
