"""The processes among which the layers of a CLT are dealt, and how what fires goes from those that encode to those that
decode: as picks, a value and a number for each latent that fires, never as activations.

Shapes: R processes, N rows, L layers, F latents of a layer, K picks of a layer per row, P pairs of row and latent.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.sae.latent_shard import LatentShard
from shared.sae.variants.base import Picks
from shared.sae.variants.clt_part import LayerShare


class LayerRanks(LatentShard):
    """All of them, as one of them sees them. A layout says how they talk: what raises NotImplementedError here."""

    def __init__(self, shares: Sequence[LayerShare], rank: int, per_layer: int) -> None:
        """`shares` are those of all processes, in the order of their ranks; `per_layer` latents has a layer."""
        self.shares, self.rank, self.per_layer = tuple(shares), rank, per_layer
        self.slots = max(len(share.layers) for share in shares)
        """Layers of the process that owns most."""
        self.num_layers = 1 + max(share.layers[-1] for share in shares)
        self.dead: list[Tensor] = []
        """Of each layer, its dead latents by their own numbers, as of the last look; on all processes alike."""

    @property
    def own(self) -> LayerShare:
        """The share of this process."""
        return self.shares[self.rank]

    def gather(self, mine: Tensor) -> Tensor:
        """[R, ...]: `mine` of every process, which have one shape."""
        raise NotImplementedError

    def sum_to_owners(self, parts: Tensor) -> Tensor:
        """[...]: the sum over all processes of their ``parts[rank]``."""
        raise NotImplementedError

    def sum(self, tensor: Tensor) -> None:
        """Sum over all processes, in place."""
        raise NotImplementedError

    def sum_in_layer(self, tensor: Tensor) -> None:
        """Sum over those that own the same layers, in place."""
        raise NotImplementedError

    def gather_in_layer(self, mine: Tensor) -> Tensor:
        """``gather`` over those that own the same layers."""
        raise NotImplementedError

    def homes(self, layer: int) -> list[tuple[int, int]]:
        """Rank and slot of each share of a layer, in the order of its latents."""
        found = [(rank, share) for rank, share in enumerate(self.shares) if layer in share.layers]
        return [(rank, share.layers.index(layer)) for rank, share in sorted(found, key=lambda one: one[1].part)]

    def padded(self, mine: Sequence[Tensor]) -> Tensor:
        """[slots, ...]: one tensor for each layer that is owned here, then zeros."""
        out = mine[0].new_zeros(self.slots, *mine[0].shape)
        for slot, tensor in enumerate(mine):
            out[slot] = tensor
        return out

    def kth_largest_of_layer(self, values_NR: Tensor, k: int) -> Tensor:
        """[N, 1]: the k-th largest of each row over the shares of a layer, -inf where there are fewer."""
        own = min(k, values_NR.shape[1])
        best_NK = values_NR.new_full((len(values_NR), k), -torch.inf)
        best_NK[:, :own] = values_NR.topk(own, dim=1).values
        if self.own.parts == 1:
            return best_NK[:, -1:]
        everyone_NK = torch.cat(list(self.gather_in_layer(best_NK)), 1)
        return everyone_NK.topk(k, dim=1).values[:, -1:]


class Exchange:
    """The picks of one micro-batch on their way: made with what fires here, it tells what fires everywhere.

    Sent are the number of pairs of each row, and of each pair its latent and its value: about 8 bytes a pair.
    """

    def __init__(self, ranks: LayerRanks, indices: Sequence[Tensor], firsts: Sequence[int], layers: int) -> None:
        """`indices` [N, K] of each layer owned here, -1 for padding; `firsts` is the first latent of each share here.
        What is asked for is that of the first `layers` layers."""
        self.ranks, self._masks_NK = ranks, [indices_NK >= 0 for indices_NK in indices]
        self._sizes = [int(mask_NK.sum()) for mask_NK in self._masks_NK]
        rows = len(indices[0])
        counts_SN = ranks.padded([mask_NK.sum(1, dtype=torch.int32) for mask_NK in self._masks_NK])
        counts_RSN = ranks.gather(counts_SN)
        totals_RS = counts_RSN.sum(2).cpu()
        sizes = [[int(total) for total in totals_S] for totals_S in totals_RS]
        self._longest = max(1, sum(self._sizes), *(sum(of_rank) for of_rank in sizes))
        numbers = [
            indices_NK[mask_NK] + first
            for indices_NK, mask_NK, first in zip(indices, self._masks_NK, firsts, strict=True)
        ]
        numbers_RP = ranks.gather(self._message(numbers).to(torch.int32))
        self._pairs: list[list[tuple[int, slice, Tensor]]] = []
        """Of each layer: the rank that sends, where in its message, and the places among the layer's [N * K]."""
        self.indices: list[Tensor] = []
        """Of each layer: [N, K], -1 for padding."""
        widths = [
            sum(counts_RSN[rank, slot] for rank, slot in ranks.homes(layer)).amax().clamp_min(1)  # type: ignore[union-attr]
            for layer in range(layers)
        ]
        for layer, width in enumerate(torch.stack(widths).cpu()):
            columns, pairs = int(width), []
            indices_NK = torch.full((rows, columns), -1, dtype=torch.int64, device=indices[0].device)
            before_N = torch.zeros_like(counts_RSN[0, 0])
            for rank, slot in ranks.homes(layer):
                starts, count_N = [0, *accumulate(sizes[rank])], counts_RSN[rank, slot]
                span = slice(starts[slot], starts[slot + 1])
                first_N = count_N.cumsum(0) - count_N
                row_P = torch.repeat_interleave(
                    torch.arange(rows, device=count_N.device), count_N, output_size=sizes[rank][slot]
                )
                at_P = torch.arange(sizes[rank][slot], device=count_N.device) - (first_N - before_N)[row_P]
                flat_P = row_P * columns + at_P
                indices_NK.view(-1)[flat_P] = numbers_RP[rank, span].long()
                pairs.append((rank, span, flat_P))
                before_N = before_N + count_N
            self._pairs.append(pairs)
            self.indices.append(indices_NK)

    def _message(self, parts: Sequence[Tensor]) -> Tensor:
        message_P = parts[0].new_zeros(self._longest)
        message_P[: sum(self._sizes)] = torch.cat(list(parts))
        return message_P

    def values(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's [N, K], from the `own` values [N, K] of the layers here. No gradient."""
        sent = [values_NK[mask_NK] for values_NK, mask_NK in zip(own, self._masks_NK, strict=True)]
        values_RP = self.ranks.gather(self._message(sent))
        found = []
        for indices_NK, pairs in zip(self.indices, self._pairs, strict=True):
            values_NK = values_RP.new_zeros(indices_NK.shape)
            for rank, span, flat_P in pairs:
                values_NK.view(-1)[flat_P] = values_RP[rank, span]
            found.append(values_NK)
        return found

    def back(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all processes of the gradients of what ``values`` gave, as those of the `own` values."""
        parts_RP = grads[0].new_zeros(len(self.ranks.shares), self._longest)
        for grad_NK, pairs in zip(grads, self._pairs, strict=True):
            for rank, span, flat_P in pairs:
                parts_RP[rank, span] = grad_NK.reshape(-1)[flat_P]
        own_P = self.ranks.sum_to_owners(parts_RP)[: sum(self._sizes)]
        found = []
        for mask_NK, own in zip(self._masks_NK, own_P.split(self._sizes), strict=True):
            grad_NK = own_P.new_zeros(mask_NK.shape)
            grad_NK[mask_NK] = own
            found.append(grad_NK)
        return found


class _Meet(torch.autograd.Function):
    """Own values to those of all layers, and pieces of decoder rows to the norms of whole ones.

    One function, so that the messages of its backward come in one order on all processes.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, with_norms: bool, num_own: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        own, decoders = tensors[:num_own], tensors[num_own:]
        ctx.exchange, ctx.num_own = exchange, num_own
        norms_LF = None
        if with_norms:
            norms_LF = square_sums(exchange.ranks, decoders).sqrt()
            ctx.save_for_backward(norms_LF, *decoders)
        values = exchange.values(own)
        return (*values, *(() if norms_LF is None else (norms_LF,)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: Exchange = ctx.exchange
        layers = len(exchange.indices)
        own = exchange.back(grads[:layers])
        decoders: list[Tensor | None] = []
        if len(grads) > layers:
            norms_LF, *rows = ctx.saved_tensors
            grad_LF = grads[layers].clone()
            exchange.ranks.sum(grad_LF)  # each latent's is on the process that encodes it
            decoders = [
                W_FD * (grad_F / norm_F.clamp_min(1e-30))[:, None]
                for W_FD, grad_F, norm_F in zip(rows, grad_LF, norms_LF, strict=False)
            ]
        return None, None, None, *own, *decoders


def meet(exchange: Exchange, own: Sequence[Tensor], decoders: Sequence[Tensor]) -> tuple[list[Picks], Tensor | None]:
    """Picks of all layers with gradients for the `own` values; and where there are `decoders`, the pieces of rows that
    are here, the norms [L, F] of the whole rows with gradients for them."""
    found = _Meet.apply(exchange, bool(decoders), len(own), *own, *decoders)
    layers = len(exchange.indices)
    picks = list(zip(found[:layers], exchange.indices, strict=True))
    return picks, found[layers] if len(found) > layers else None


def square_sums(ranks: LayerRanks, rows: Sequence[Tensor]) -> Tensor:
    """[L, F]: the squared norms of decoder rows, of which `rows` are the pieces of the first layers' that are here."""
    sums_LF = rows[0].new_zeros(ranks.num_layers, rows[0].shape[0])
    for layer, rows_FD in enumerate(rows):
        sums_LF[layer] = torch.linalg.vector_norm(rows_FD, dim=1).square()
    ranks.sum(sums_LF)
    return sums_LF
