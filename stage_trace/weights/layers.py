"""The path of a latent through the residual stream to the latents of later layers, attention left out.

    p_0 = 0;   p_{m+1} = p_m + W_skip,m norm_m(p_m) + d_i,m      m: the layers from the source's to before the target's
    V_ij = norm(p) . e_j

d_i,m is source i's decoder row for the MLP of layer m (a transcoder writes that of its own layer, a CLT's latents those
of the later ones too), e_j target j's encoder row, both in raw units; norms multiply by their weight and by their mean
factor over tokens, which differs from one token to the next. Shapes: F latents of a layer, D width of the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearParts, Norm
from stage_trace.group_weights import GroupWeights, raw_skip
from stage_trace.session import Source


@dataclass(frozen=True, slots=True)
class ReadNorm:
    """The norm that a group reads behind, at its mean factor."""

    norm: Norm
    factor: Tensor

    def forward(self, x_FD: Tensor) -> Tensor:
        """What it makes of a change of the stream."""
        return self.norm.apply(x_FD, self.factor, 0.0)

    def pull_back(self, g_FD: Tensor) -> Tensor:
        """The gradient of the stream."""
        return self.norm.pull_back(g_FD, self.factor)


@dataclass(frozen=True, slots=True)
class Layer:
    """A group of latents, and what of its dictionary a path passes."""

    number: int
    num_latents: int
    weights: GroupWeights
    skip: Tensor | None
    norm: ReadNorm | None
    """None where it reads the stream itself."""

    def encoders(self, some: slice) -> Tensor:
        """What the latents `some` read of the stream [n, D]."""
        rows_nD = self.weights.encoder(torch.arange(self.num_latents)[some])
        return rows_nD if self.norm is None else self.norm.pull_back(rows_nD)


def layers_of(sources: Sequence[Source], parts: LinearParts, factors: Mapping[int, float]) -> list[Layer]:
    """Every group of the dictionaries, by the layer that it reads; `factors` are the mean ones of the MLPs' norms."""
    like_D = parts.final_norm.weight_D.to(torch.promote_types(parts.W_U_VD.dtype, torch.float32))
    found = []
    for source in sources:
        dictionary = source.open()
        rows = source.rows(dictionary)
        for number, place in enumerate(source.places):
            layer = place.own.layer
            weights = GroupWeights.of(dictionary, rows[number], number, place, like_D)
            norm = ReadNorm(parts.layers[layer].mlp_norm, like_D.new_tensor(factors[layer]))
            is_behind = place.read.site == "mlp_in"
            made = Layer(layer, dictionary.groups[number].num_latents, weights, None, norm if is_behind else None)
            found.append(replace(made, skip=raw_skip(dictionary, weights.folded)))
        del dictionary
    return sorted(found, key=lambda one: one.number)


@torch.no_grad()
def written(layers: Mapping[int, Layer], source: Layer, target: int) -> Tensor:
    """What one unit of each latent of `source` adds to the stream that layer `target` reads, [F, D]."""
    every = torch.arange(source.num_latents)
    path_FD = None
    for number in range(source.number, target):
        passed = layers.get(number)
        if path_FD is not None and passed is not None and passed.skip is not None:
            read_FD = path_FD if passed.norm is None else passed.norm.forward(path_FD)
            path_FD = path_FD + read_FD @ passed.skip.T
        output = HookPoint(number, "mlp_out")
        if output in source.weights.place.writes:
            added_FD = source.weights.decoder(output, every)
            path_FD = added_FD if path_FD is None else path_FD + added_FD
    assert path_FD is not None
    return path_FD
