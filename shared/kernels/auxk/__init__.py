"""AuxK: dead latents reconstruct what the living ones leave over (Gao et al. 2024, A.2), on their rows alone.

There is no kernel of its own for a GPU: ``blocks`` is matrix products alone, the same on every device.
"""

import torch

from shared.kernels.auxk.leaky import leaky, leaky_, through_leaky_
from shared.kernels.auxk.ranks import ALONE, DeadRows, LatentRanks
from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import resolve


def auxk_error(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    dead: DeadRows,
    num_aux: int,
    *,
    slope: float = 0.0,
    compute: Compute = AUTO,
    ranks: LatentRanks = ALONE,
) -> torch.Tensor:
    """``mean_n |e_n - e_hat_n|^2 / |e_n|^2``, a scalar, with gradients for the dead latents' rows and biases only.

    e = `residual_ND` and `centred_ND` are taken as constants. e_hat decodes, without b_dec, the num_aux largest
    pre-activations of the dead latents through a ReLU, leaky with `slope` below 0 (all of them where they are no more;
    at a tie, all that tie). R of them are here, maybe 0, and ``dead.count`` in all `ranks` together.

    reference: autograd through the dense [N, R] activations. Else the gradient is computed with the value, in blocks of
    rows, so that memory does not grow with N x R; compute.dtype bfloat16 runs its matrix products in bfloat16.
    """
    arguments = (residual_ND.detach(), centred_ND.detach(), dead, num_aux, ranks, slope)
    if resolve(compute.kernels, residual_ND) == "reference":
        from shared.kernels.auxk import reference

        return reference.auxk_error(*arguments)
    from shared.kernels.auxk import blocks

    return blocks.auxk_error(*arguments, compute.dtype_for(residual_ND))


__all__ = ["ALONE", "DeadRows", "LatentRanks", "auxk_error", "leaky", "leaky_", "through_leaky_"]
