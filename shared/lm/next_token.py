"""Next-token scores from final hidden states, a few rows of the vocabulary at a time.

4096 positions times 128k tokens in float32 are 2 GiB per condition, and an evaluation has several conditions; so the
hidden states are kept and the logits made in chunks, where every condition meets the clean distribution.

Legend: N scored positions, R rows of a chunk, D d_model, V vocabulary, Q conditions (the first is the clean model).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError

LOGIT_BYTES = 256 << 20
# Clean log-probabilities, a condition's logits and log-probabilities, and one product of theirs live at a time.
COPIES = 4


@dataclass(frozen=True)
class TokenScores:
    """Scores of N positions under Q conditions, float64 [Q, N] each, in nats."""

    cross_entropy_QN: Tensor
    kl_QN: Tensor
    """KL(clean || condition)."""
    agrees_QN: Tensor
    """1 where the condition's most likely token is the clean model's."""


class VocabularyHead(nn.Module):
    """Maps the hidden state after the final norm to float32 logits, as the model itself does it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.projection: nn.Module = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        logits_NV: Tensor = self.projection(hidden_ND).float()
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def check_head(model: PreTrainedModel, head: VocabularyHead) -> None:
    """Raise GranaryError if the model makes logits in a way `head` does not know (Granite and Cohere scale them)."""
    probe = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        ours, theirs = head(hidden[0]), model(input_ids=probe, use_cache=False).logits[0].float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        name = type(model).__name__
        raise GranaryError(f"{name} changes its logits after the output embedding: its loss can't be evaluated here")


def score_next_tokens(head: nn.Module, hidden_QND: Sequence[Tensor], labels_N: Tensor) -> TokenScores:
    """Cross-entropy of `labels_N`, KL from the clean distribution and top-1 agreement, for each condition.

    `hidden_QND`: one [N, D] tensor per condition in the model's dtype, the clean model's first. Softmax in float32.
    """
    rows = chunk_rows(head, hidden_QND[0])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(labels_N), rows):
        labels_R1 = labels_N[start : start + rows, None]
        clean_RV = F.log_softmax(head(hidden_QND[0][start : start + rows]), dim=-1)
        clean_top_R = clean_RV.argmax(-1)
        ce, kl, agrees = [], [], []
        for condition, hidden_ND in enumerate(hidden_QND):
            log_RV = clean_RV if condition == 0 else F.log_softmax(head(hidden_ND[start : start + rows]), dim=-1)
            ce.append(-log_RV.gather(1, labels_R1)[:, 0])
            kl.append((clean_RV.exp() * (clean_RV - log_RV)).sum(-1))
            agrees.append(log_RV.argmax(-1) == clean_top_R)
        parts.append((torch.stack(ce), torch.stack(kl), torch.stack(agrees)))
    if not parts:
        empty = torch.zeros(len(hidden_QND), 0, dtype=torch.float64, device=labels_N.device)
        return TokenScores(empty, empty, empty)
    return TokenScores(*(torch.cat(columns, dim=1).double() for columns in zip(*parts, strict=True)))


def chunk_rows(head: nn.Module, hidden_ND: Tensor) -> int:
    """How many positions' logits fit into `LOGIT_BYTES`."""
    return rows_at_once(head(hidden_ND[:1]).shape[-1])


def rows_at_once(vocabulary: int) -> int:
    """The same for so many tokens."""
    return max(1, LOGIT_BYTES // (COPIES * 4 * vocabulary))
