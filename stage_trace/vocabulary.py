"""Which tokens a latent writes for and reads for, straight from the weights: no activations are needed.

The direct path alone, through the final norm's weight for what a latent writes; what later layers make of it is what
the graph's edges say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from stage_trace.nodes import Kind, Node
from stage_trace.session import Session

MOST = 8
VOCABULARY_BLOCK = 8192
"""Rows of the unembedding that are made float32 at a time."""


@dataclass(frozen=True, slots=True)
class Words:
    """Token ids of features, by output and latent: those it makes likelier and those it makes less likely."""

    promotes: dict[tuple[HookPoint, int], list[int]]
    suppresses: dict[tuple[HookPoint, int], list[int]]

    @classmethod
    @torch.no_grad()
    def of(cls, session: Session, nodes: Sequence[Node]) -> "Words":
        """Compute those of every feature among `nodes`, an output at a time."""
        promotes, suppresses = {}, {}
        norm, W_U_VD = session.parts.final_norm, session.parts.W_U_VD
        for stand_in in session.replacement.stand_ins:
            own = stand_in.output
            wanted = {node.number for node in nodes if node.kind is Kind.feature and node.output == own}
            latents = stand_in.latents
            rows = {latent: row for row, latent in enumerate(latents.latent_N.tolist()) if latent in wanted}
            if not rows:
                continue
            some = torch.tensor(list(rows.values()), device=latents.latent_N.device)
            # On the direct path it makes no difference which MLP adds it.
            decoder_FD = torch.stack([latents.decoder(output, some).float() for output in latents.writes]).sum(0)
            logits_FV = _direct(decoder_FD, norm.weight_D.float(), W_U_VD)
            for latent, high, low in zip(
                rows,
                logits_FV.topk(MOST).indices.tolist(),
                (-logits_FV).topk(MOST).indices.tolist(),
                strict=True,
            ):
                promotes[own, latent], suppresses[own, latent] = high, low
        return cls(promotes, suppresses)


def _direct(decoder_FD: Tensor, weight_D: Tensor, W_U_VD: Tensor) -> Tensor:
    read_FD = decoder_FD * weight_D
    return torch.cat([read_FD @ some_VD.float().T for some_VD in torch.split(W_U_VD, VOCABULARY_BLOCK)], 1)
