"""Attention patterns of many small heads: what each position attends to, by the form of a language model's attention.

    q, k = rotate(norm(W x + b));   S = scale q k^T, softcapped;   A = softmax(S over keys of the same document, s <= t)

Shapes: C contexts, T positions, D width of what is read, G heads, E width of a head, R of its rotated pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels.compute import Compute
from shared.kernels.product import product


@dataclass(frozen=True, slots=True)
class Form:
    """How queries and keys become patterns, in the words of transformers."""

    scale: float
    """Times the products of queries and keys."""
    softcap: float | None = None
    """c in c tanh(S / c) (Gemma 2)."""
    window: int | None = None
    """Positions that a query looks back to, its own included; None: all."""
    frequencies: tuple[float, ...] = ()
    """RoPE: radians per position of each pair (i, i + R) of a head's first 2 R features; empty: no rotation."""
    rope_scale: float = 1.0
    """Times cosines and sines."""
    norm_eps: float | None = None
    """RMSNorm of queries and keys before the rotation (Qwen 3); None: none."""

    @property
    def idle_from(self) -> int | None:
        """The first feature from which on a bias of keys adds the same to all scores of a query, and so does nothing.

        None where each does something. Rounding would leave of such a bias's gradient what an optimiser takes for one.
        """
        return None if self.softcap is not None or self.norm_eps is not None else 2 * len(self.frequencies)


@dataclass(frozen=True, slots=True)
class QueryKey:
    """Weights of some heads."""

    W_Q_GED: Tensor
    b_Q_GE: Tensor
    W_K_GED: Tensor
    b_K_GE: Tensor
    norm_Q_GE: Tensor | None = None
    norm_K_GE: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in order."""
        return (self.W_Q_GED, self.b_Q_GE, self.W_K_GED, self.b_K_GE, self.norm_Q_GE, self.norm_K_GE)

    def heads(self, chosen: slice) -> "QueryKey":
        """Those of some of the heads."""
        return QueryKey(*(None if tensor is None else tensor[chosen] for tensor in self.tensors()))  # type: ignore[arg-type]


def positions_in(documents_CT: Tensor) -> Tensor:
    """int64 [C, T]: of each position from the start of its document."""
    index_T = torch.arange(documents_CT.shape[1], device=documents_CT.device)
    is_start_CT = torch.ones_like(documents_CT, dtype=torch.bool)
    is_start_CT[:, 1:] = documents_CT[:, 1:] != documents_CT[:, :-1]
    return index_T - torch.where(is_start_CT, index_T, 0).cummax(dim=1).values


def may_attend(documents_CT: Tensor, window: int | None) -> Tensor:
    """bool [C, T, T]: whether query t sees key s. Padding is a document of its own."""
    index_T = torch.arange(documents_CT.shape[1], device=documents_CT.device)
    back_TT = index_T[:, None] - index_T
    seen_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    return seen_TT & (documents_CT[:, :, None] == documents_CT[:, None, :])


def angles(form: Form, positions_CT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [C, T, 1, R], computed in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies_R = torch.tensor(form.frequencies, dtype=wide, device=positions_CT.device)
    turned_CTR = positions_CT[:, :, None].to(wide) * frequencies_R
    return tuple((form.rope_scale * part)[:, :, None].to(dtype) for part in (turned_CTR.cos(), turned_CTR.sin()))  # type: ignore[return-value]


def rotated(x_CTGE: Tensor, cos_CT1R: Tensor, sin_CT1R: Tensor) -> Tensor:
    """Features i and i + R turned together; what lies behind the first 2 R stays."""
    half = cos_CT1R.shape[-1]
    one, two, rest = x_CTGE[..., :half], x_CTGE[..., half : 2 * half], x_CTGE[..., 2 * half :]
    turned = (one * cos_CT1R - two * sin_CT1R, two * cos_CT1R + one * sin_CT1R)
    return torch.cat([*turned, rest], dim=-1)


def patterns(x_CTD: Tensor, documents_CT: Tensor, heads: QueryKey, form: Form, compute: Compute) -> Tensor:
    """A [C, G, T, T], rows are queries; differentiable."""
    C, T, D = x_CTD.shape
    G, E, _ = heads.W_Q_GED.shape
    turn = angles(form, positions_in(documents_CT), x_CTD.dtype) if form.frequencies else None

    def projected(W_GED: Tensor, b_GE: Tensor, norm_GE: Tensor | None) -> Tensor:
        rows = product(x_CTD.reshape(C * T, D), W_GED.flatten(0, 1).T, b_GE.flatten(), compute=compute)
        rows_CTGE = rows.view(C, T, G, E)
        if form.norm_eps is not None:
            assert norm_GE is not None
            mean_CTG1 = rows_CTGE.square().mean(-1, keepdim=True)
            rows_CTGE = norm_GE * (rows_CTGE * torch.rsqrt(mean_CTG1 + form.norm_eps))
        if turn is not None:
            rows_CTGE = rotated(rows_CTGE, *turn)
        return rows_CTGE.transpose(1, 2)

    q_CGTE = projected(heads.W_Q_GED, heads.b_Q_GE, heads.norm_Q_GE)
    k_CGTE = projected(heads.W_K_GED, heads.b_K_GE, heads.norm_K_GE)
    scores_CGTT = q_CGTE @ k_CGTE.transpose(2, 3) * form.scale
    if form.softcap is not None:
        scores_CGTT = torch.tanh(scores_CGTT / form.softcap) * form.softcap
    seen_C1TT = may_attend(documents_CT, form.window)[:, None]
    return torch.softmax(scores_CGTT.masked_fill(~seen_C1TT, -torch.inf), dim=-1)
