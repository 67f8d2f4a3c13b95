"""Where the heads of a Lorsa start: at the language model's own, whose patterns they then are.

Shapes: H heads held here, E features of a head, D width of what is read, L latents of a head.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.variants.lorsa import Lorsa

if TYPE_CHECKING:
    from shared.lm.attention import ModelHeads


@torch.no_grad()
def start_heads(lorsa: Lorsa, model: "ModelHeads", first: int) -> None:
    """Set queries and keys to the model's, and put each w_V among the directions that its head moves.

    Each head of the model is there as often as H is a multiple of their number. What is read is x~ = c (x - mean), so
    that W x + b is (W / c) x~ + b + W mean. A w_V is its random row within the E dimensions of the head's own values
    (the subspace of Llamascopium's start). `first`: the number of the first head held here. Call it when the
    normalisation is set.
    """
    heads = model.query_key
    copies, rest = divmod(lorsa.config.qk_heads, len(heads.W_Q_GED))
    if rest or heads.W_Q_GED.shape[1:] != lorsa.W_Q.shape[1:]:
        raise GranaryError(
            f"the model has {len(heads.W_Q_GED)} heads of {heads.W_Q_GED.shape[1]} features, the lorsa "
            f"{lorsa.config.qk_heads} of {lorsa.config.qk_width}: no multiple"
        )

    def own(all_hX: Tensor) -> Tensor:
        chosen = slice(first, first + len(lorsa.W_Q))
        return all_hX.repeat_interleave(copies, 0)[chosen].to(lorsa.W_Q)

    for W, b, from_W, from_b in (
        (lorsa.W_Q, lorsa.b_Q, own(heads.W_Q_GED), own(heads.b_Q_GE)),
        (lorsa.W_K, lorsa.b_K, own(heads.W_K_GED), own(heads.b_K_GE)),
    ):
        W.copy_(from_W / lorsa.input_scale)
        b.copy_(from_b + from_W @ lorsa.input_mean)
    if heads.norm_Q_GE is not None and heads.norm_K_GE is not None:
        lorsa.norm_Q.copy_(own(heads.norm_Q_GE))
        lorsa.norm_K.copy_(own(heads.norm_K_GE))
    basis_HDE = torch.linalg.qr(own(model.W_V_HED).mT).Q
    rows_HLD = lorsa.W_enc.view(len(lorsa.W_Q), -1, lorsa.W_enc.shape[1]) @ basis_HDE @ basis_HDE.mT
    lorsa.W_enc.copy_((rows_HLD / rows_HLD.norm(dim=2, keepdim=True)).flatten(0, 1))
