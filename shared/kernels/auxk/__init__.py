"""AuxK: dead latents reconstruct what the living ones leave over (Gao et al. 2024, A.2), on their rows alone."""

import torch

from shared.kernels.dispatch import resolve


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
) -> torch.Tensor:
    """``mean_n |e_n - e_hat_n|^2 / |e_n|^2``, a scalar, with gradients for the dead latents' rows and biases only.

    e = `residual_ND` and `centred_ND` are taken as constants. e_hat decodes, without b_dec, the num_aux largest
    ReLU pre-activations of the R dead latents (all of them where R <= num_aux; at a tie, all that tie). R may be 0.

    reference: autograd through the dense [N, R] activations. Else the gradient is computed with the value, in blocks of
    rows, so that memory does not grow with N x R; compute_dtype bfloat16 runs its matrix products in bfloat16.
    """
    arguments = (residual_ND.detach(), centred_ND.detach(), W_enc_RD, b_enc_R, W_dec_RD, num_aux)
    if resolve(kernels, residual_ND) == "reference":
        from shared.kernels.auxk import reference

        return reference.auxk_error(*arguments)
    from shared.kernels.auxk import blocks

    return blocks.auxk_error(*arguments, compute_dtype)
