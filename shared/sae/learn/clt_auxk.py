"""AuxK of a CLT whose layers are dealt among processes: who encodes dead latents sends values to who decodes them.

Shapes: N rows, R dead latents of a layer, D width of what is read or written here, P values of a message.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.kernels import leaky_, through_leaky_
from shared.sae.learn.layer_ranks import LayerRanks


def auxk_over_ranks(
    ranks: LayerRanks,
    aux: Sequence[int],
    own: Sequence[tuple[Tensor, Tensor, Tensor]],
    decoders: Sequence[tuple[Tensor, Tensor]],
    slope: float,
) -> Tensor:
    """The mean over layers of ``losses.auxk_loss``: what it adds up to at the columns that are written here, a scalar.

    `aux` latents per token help at each layer. `own`: of the layers here, what they read [N, D] and the rows [R, D] and
    biases [R] of the dead latents' encoders. `decoders`: of the first layers on, the residual [N, D] at the columns
    here, and the dead latents' rows [R, D]; all R of them, wherever they are encoded. `slope`: of their ReLU below 0.
    Gradients for rows and biases.
    """
    tensors = [tensor for one in (*own, *decoders) for tensor in one]
    total: Tensor = _AuxK.apply(ranks, aux, slope, len(own), *tensors)
    return total


class _AuxK(torch.autograd.Function):
    """``auxk_loss`` of every layer, a mean over layers: what it adds up to at the columns here.

    Values of dead latents go to those that decode them, [N, R] of each layer; all messages are sent in the forward.
    """

    @staticmethod
    def forward(
        ctx: Any, ranks: LayerRanks, aux: Sequence[int], slope: float, num_own: int, *tensors: Tensor
    ) -> Tensor:
        own = [tensors[3 * number : 3 * number + 3] for number in range(num_own)]
        rest = tensors[3 * num_own :]
        decoders = list(zip(rest[::2], rest[1::2], strict=True))
        rows, counts = len(own[0][0]), [len(latents_R) for latents_R in ranks.dead]
        values = []
        for layer, (given_ND, W_enc_RD, b_enc_R) in zip(ranks.own.layers, own, strict=True):
            z_NR = leaky_(torch.addmm(b_enc_R, given_ND, W_enc_RD.T), slope)
            if counts[layer] > aux[layer]:
                z_NR.masked_fill_(z_NR < ranks.kth_largest_of_layer(z_NR, aux[layer]), 0)
            values.append(z_NR)
        spans = _Spans(ranks, counts)
        gathered = spans.read(ranks.gather(spans.message(values)), len(decoders))
        energy_LN = values[0].new_zeros(ranks.num_layers, rows)
        for layer, (residual_ND, _) in enumerate(decoders):
            energy_LN[layer] = residual_ND.square().sum(1)
        ranks.sum(energy_LN)
        energy_LN.clamp_min_(torch.finfo(energy_LN.dtype).tiny)
        total, dz, grads = values[0].new_zeros(()), [], []
        for layer, (z_NR, (residual_ND, W_dec_RD)) in enumerate(zip(gathered, decoders, strict=True)):
            weight_N = min(counts[layer] / aux[layer], 1.0) / ranks.num_layers / rows / energy_LN[layer]
            error_ND = z_NR @ W_dec_RD - residual_ND
            total += (error_ND.square().sum(1) * weight_N).sum()
            grad_ND = error_ND * (2 * weight_N)[:, None]
            dz.append(grad_ND @ W_dec_RD.T)
            grads.append(z_NR.T @ grad_ND)
        back = spans.own(ranks.sum_to_owners(spans.scatter(dz)))
        saved = []
        for (given_ND, _, _), z_NR, dz_NR in zip(own, values, back, strict=True):
            dz_NR = through_leaky_(dz_NR.clone(), z_NR, slope)
            saved += [dz_NR.T @ given_ND, dz_NR.sum(0)]
        ctx.save_for_backward(*saved, *grads)
        ctx.num_own = num_own
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, 2 * ctx.num_own
        own = [(None, dW * grad, db * grad) for dW, db in zip(saved[:count:2], saved[1:count:2], strict=True)]
        decoders = [(None, dW * grad) for dW in saved[count:]]
        return None, None, None, None, *(one for row in (*own, *decoders) for one in row)


class _Spans:
    """Where the values of each layer's dead latents lie in the messages of the processes that encode them."""

    def __init__(self, ranks: LayerRanks, counts: Sequence[int]) -> None:
        """`counts` are of each layer, all its shares together."""
        self.ranks = ranks
        self.sizes = []
        """Of every process: dead latents of each of its layers that it encodes."""
        for share in ranks.shares:
            held = []
            for layer in share.layers:
                first, rows = share.span(ranks.per_layer)
                is_held_R = (ranks.dead[layer] >= first) & (ranks.dead[layer] < first + rows)
                held.append(counts[layer] if share.parts == 1 else int(is_held_R.sum()))
            self.sizes.append(held)
        self.longest = max(1, *(sum(held) for held in self.sizes))

    def message(self, values: Sequence[Tensor]) -> Tensor:
        """[N, most latents of a process]: those of the layers here."""
        own_NR = torch.cat(list(values), 1)
        message_NR = own_NR.new_zeros(len(own_NR), self.longest)
        message_NR[:, : own_NR.shape[1]] = own_NR
        return message_NR

    def _span(self, rank: int, slot: int) -> slice:
        start = sum(self.sizes[rank][:slot])
        return slice(start, start + self.sizes[rank][slot])

    def read(self, messages_RNP: Tensor, layers: int) -> list[Tensor]:
        """Read those of the first layers, [N, R] each."""
        return [
            torch.cat([messages_RNP[rank, :, self._span(rank, slot)] for rank, slot in self.ranks.homes(layer)], 1)
            for layer in range(layers)
        ]

    def scatter(self, grads: Sequence[Tensor]) -> Tensor:
        """Return to each process the gradients of what it sent."""
        parts = grads[0].new_zeros(len(self.sizes), len(grads[0]), self.longest)
        for layer, grad_NR in enumerate(grads):
            homes = self.ranks.homes(layer)
            pieces = grad_NR.split([self.sizes[rank][slot] for rank, slot in homes], 1)
            for (rank, slot), piece in zip(homes, pieces, strict=True):
                parts[rank, :, self._span(rank, slot)] = piece
        return parts

    def own(self, sums_NP: Tensor) -> list[Tensor]:
        """The spans of the layers here."""
        rank = self.ranks.rank
        return [sums_NP[:, self._span(rank, slot)] for slot in range(len(self.sizes[rank]))]
