"""AuxK: dead latents reconstruct what the living ones leave over (Gao et al. 2024, A.2), on their rows alone."""

import torch

from shared.kernels.dispatch import resolve


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
    W_enc_RD: torch.Tensor,
    b_enc_R: torch.Tensor,
    W_dec_RD: torch.Tensor,
    num_aux: int,
    *,
    kernels: str = "auto",
    compute_dtype: str = "float32",
    holders: Holders = ALONE,
    num_dead: int | None = None,
) -> torch.Tensor:
    """``mean_n |e_n - e_hat_n|^2 / |e_n|^2``, a scalar, with gradients for the dead latents' rows and biases only.

    e = `residual_ND` and `centred_ND` are taken as constants. e_hat decodes, without b_dec, the num_aux largest
    ReLU pre-activations of the dead latents (all of them where they are no more; at a tie, all that tie). R of them are
    here, maybe 0, and `num_dead` in all `holders` together; None: R.

    reference: autograd through the dense [N, R] activations. Else the gradient is computed with the value, in blocks of
    rows, so that memory does not grow with N x R; compute_dtype bfloat16 runs its matrix products in bfloat16.
    """
    num_dead = W_enc_RD.shape[0] if num_dead is None else num_dead
    arguments = (residual_ND.detach(), centred_ND.detach(), W_enc_RD, b_enc_R, W_dec_RD, num_aux, holders, num_dead)
    if resolve(kernels, residual_ND) == "reference":
        from shared.kernels.auxk import reference

        return reference.auxk_error(*arguments)
    from shared.kernels.auxk import blocks

    return blocks.auxk_error(*arguments, compute_dtype)
