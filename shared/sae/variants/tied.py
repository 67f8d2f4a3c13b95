"""Tied decoders of a cross-layer transcoder: 2 L F D parameters in place of (L + L (L + 1) / 2) F D.

    per_source    W_l,t[i] = a_l,t[i] W_l[i]      one direction for each latent, and how much of it each target gets
    per_target    W_l,t[i] = W_t[i]               one matrix for each target, which the latents i of all layers share

Shapes: F latents of a layer, T written sites of one, D width of a site, N rows, K picks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared.kernels import PairGradient, PairOrder, decode, sparse_decode
from shared.sae.contexts import Given
from shared.sae.groups import ComputeChoice, LatentGroup, random_unit_rows
from shared.sae.roles import Role

TYINGS = ("none", "per_source", "per_target")
POWER_STEPS = 3


class TiedGroup(LatentGroup):
    """A layer whose decoder's rows are made of parameters that it does not have alone, or not for each target."""

    def __init__(self, choice: ComputeChoice, targets: int) -> None:
        """`targets`: how many sites it writes."""
        super().__init__(choice)
        self.targets = targets

    def draw(self, generator: torch.Generator | None) -> None:
        """Random first values of what it has alone."""
        raise NotImplementedError

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]  # noqa: N802 (it stands for a parameter)
        """The decoder as without tying, [F, sum of the targets' widths], with gradient: as large as that."""
        return self.decoder_rows(torch.arange(self.num_latents, device=self.W_enc.device))

    def group_roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """Return the group's, without the decoder's."""
        roles = super().group_roles(unit_norm_decoder=unit_norm_decoder)
        del roles["W_dec"]
        return roles


class PerSource(TiedGroup):
    """One direction per latent. Rows of ``W_row`` and of ``shares`` have unit norm, and so has the whole row."""

    def make_matrices(self, d_in: int, d_out: int, num_latents: int) -> None:
        """`d_out` is the sum over targets, which are all as wide."""
        self.make_encoder(d_in, num_latents)
        self.W_row = nn.Parameter(torch.empty(num_latents, d_out // self.targets))
        self.shares = nn.Parameter(torch.empty(num_latents, self.targets))

    def draw(self, generator: torch.Generator | None) -> None:
        """First values."""
        for rows in (self.W_row, self.shares, self.W_enc):
            random_unit_rows(rows, generator)

    def decoder_rows(self, latents_R: Tensor, sink: PairGradient | None = None) -> Tensor:
        """``a_t W`` side by side, [R, T D]."""
        return torch.einsum("rt,rd->rtd", self.shares[latents_R], self.W_row[latents_R]).flatten(1)

    def write(
        self,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None = None,
        *,
        read: Given | None = None,
    ) -> Tensor:
        """Every target is a row of its own in one sum over picks, so that W_row is gathered, and learns, once."""
        values_MK, indices_MK = self._by_target(values_NK, indices_NK)
        order_M = PairOrder(indices_MK, self.num_latents)
        y_MD = sparse_decode(values_MK, indices_MK, self.W_row, order_M, compute=self.compute)
        return y_MD.view(self.targets, len(values_NK), -1).transpose(0, 1).flatten(1)

    def written(self, values_NK: Tensor, indices_NK: Tensor, *, read: Given | None = None) -> Tensor:
        """Write without gradient."""
        y_MD = decode(*self._by_target(values_NK, indices_NK), self.W_row, kernels=self.kernels)
        return y_MD.view(self.targets, len(values_NK), -1).transpose(0, 1).flatten(1)

    def _by_target(self, values_NK: Tensor, indices_NK: Tensor) -> tuple[Tensor, Tensor]:
        """What each target gets, [T N, K]."""
        safe_P = indices_NK.clamp_min(0).reshape(-1)
        shares_TNK = self.shares.index_select(0, safe_P).T.reshape(self.targets, *indices_NK.shape)
        return (shares_TNK * values_NK).flatten(0, 1), indices_NK.repeat(self.targets, 1)

    def decoder_norm(self) -> Tensor | None:
        """Return that of the whole row."""
        return None if self.has_unit_rows else self.shares.norm(dim=1) * self.W_row.norm(dim=1)

    @torch.no_grad()
    def start(self, rows_FD: Tensor) -> None:
        """The direction, and its shares, nearest to `rows_FD` [F, T D]; latents whose row is 0 keep theirs."""
        wanted_FTD = rows_FD.unflatten(1, (self.targets, -1))
        direction_FD = wanted_FTD[:, 0]  # of the layer's own site
        for _ in range(POWER_STEPS):
            shares_FT = torch.einsum("ftd,fd->ft", wanted_FTD, direction_FD)
            direction_FD = _unit(torch.einsum("ftd,ft->fd", wanted_FTD, _unit(shares_FT)))
        has_one_F1 = (rows_FD.norm(dim=1) > 0)[:, None]
        self.W_row.copy_(torch.where(has_one_F1, direction_FD, self.W_row))
        self.shares.copy_(torch.where(has_one_F1, _unit(shares_FT), self.shares))

    def group_roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """W_row is a decoder; the shares are no directions."""
        own = {
            "W_row": Role(latent_axis=0, rate="decoder", is_matrix=True, unit_rows=unit_norm_decoder),
            "shares": Role(latent_axis=0, rate="decoder", unit_rows=unit_norm_decoder),
        }
        return {**super().group_roles(unit_norm_decoder=unit_norm_decoder), **own}


class TargetDecoders(nn.Module):
    """One decoder for each written site, [F, D], with rows of unit norm."""

    def __init__(self, num_latents: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.W = nn.ParameterList([torch.empty(num_latents, width) for width in widths])

    def draw(self, generator: torch.Generator | None) -> None:
        """First values."""
        for W_FD in self.W:
            random_unit_rows(W_FD, generator)

    def roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """Return those of each matrix."""
        role = Role(latent_axis=0, rate="decoder", is_matrix=True, unit_rows=unit_norm_decoder)
        return {f"W.{number}": role for number in range(len(self.W))}

    @torch.no_grad()
    def start(self, rows: Sequence[Tensor]) -> None:
        """The sum of what each layer wants, `rows` [F, sum of its targets' widths]; rows that are 0 keep theirs."""
        for target, W_FD in enumerate(self.W):
            first = [sum(other.shape[1] for other in list(self.W)[layer:target]) for layer in range(target + 1)]
            wanted_FD = torch.stack(
                [rows[layer].narrow(1, start, W_FD.shape[1]) for layer, start in enumerate(first)]
            ).sum(0)
            W_FD.copy_(torch.where(wanted_FD.norm(dim=1, keepdim=True) > 0, _unit(wanted_FD), W_FD))


class PerTarget(TiedGroup):
    """A layer of those that share the targets' decoders."""

    def __init__(self, choice: ComputeChoice, shared: TargetDecoders, layer: int) -> None:
        super().__init__(choice, len(shared.W) - layer)
        self._shared = (shared,)  # in a tuple, as it is no part of this layer
        self.layer = layer

    @property
    def _matrices(self) -> list[Tensor]:
        return list(self._shared[0].W)[self.layer :]

    def make_matrices(self, d_in: int, d_out: int, num_latents: int) -> None:
        """The encoder's."""
        self.make_encoder(d_in, num_latents)

    def draw(self, generator: torch.Generator | None) -> None:
        """First values of its own."""
        random_unit_rows(self.W_enc, generator)

    def decoder_rows(self, latents_R: Tensor, sink: PairGradient | None = None) -> Tensor:
        """Those of its targets side by side."""
        return torch.cat([W_FD.index_select(0, latents_R) for W_FD in self._matrices], 1)

    def write(
        self,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None = None,
        *,
        read: Given | None = None,
    ) -> Tensor:
        """Target after target."""
        parts = [sparse_decode(values_NK, indices_NK, W, order, compute=self.compute) for W in self._matrices]
        return torch.cat(parts, 1)

    def written(self, values_NK: Tensor, indices_NK: Tensor, *, read: Given | None = None) -> Tensor:
        """Write without gradient."""
        return torch.cat([decode(values_NK, indices_NK, W, kernels=self.kernels) for W in self._matrices], 1)

    def decoder_norm(self) -> Tensor | None:
        """Return the norms, with rows of unit norm at each target too: an earlier layer has more of them."""
        return torch.stack([W_FD.square().sum(1) for W_FD in self._matrices]).sum(0).sqrt()


def _unit(rows_FD: Tensor) -> Tensor:
    return rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-30)
