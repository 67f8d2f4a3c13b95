"""Global weights of a set of dictionaries: virtual weights times how the two latents fire together.

Ameisen et al. 2025 (Circuit Tracing), of a source i and a target j of a later layer, over the tokens of a corpus:

    ERA_ij   = V_ij E[a_i 1(a_j > 0)]              expected residual attribution
    TWERA_ij = V_ij E[a_i a_j] / E[a_j]            the same, weighted by the target's activation

V_ij: the virtual weight, see ``layers``. Tiles of pairs are made one by one, some target latents of a layer with all
latents of an earlier layer: beside the firing of the sample and n connections of each latent, one layer's decoder rows
and one tile are in memory. Shapes: F latents of a layer, B of a block, D width of the stream.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared.latents.global_weights import DIRECTIONS, GlobalWeightsWriter
from stage_trace.weights.firing import Firing, Together
from stage_trace.weights.layers import Layer, written
from stage_trace.weights.strongest import Strongest

CELLS = 1 << 20
"""Pairs of a tile."""


@torch.no_grad()
def write_weights(
    layers: Sequence[Layer], firing: Mapping[int, Firing], num_tokens: int, most: int, writer: GlobalWeightsWriter
) -> None:
    """Both directions of every latent; `layers` ascend."""
    by_number = {layer.number: layer for layer in layers}
    starts, total = [], 0
    for layer in layers:
        starts.append(total)
        total += layer.num_latents
    targets = Strongest(total, most, layers[0].weights.folded.input_scale)
    for at, target in enumerate(layers):
        sources = Strongest(target.num_latents, most, targets.columns[0])
        goal = firing[target.number]
        for source, first in zip(layers[:at], starts, strict=False):
            path_FD = written(by_number, source, target.number)
            for block in blocks(target.num_latents, source.num_latents):
                tile = scores(path_FD, target.encoders(block), goal, block, firing[source.number], num_tokens)
                sources.offer(block, first, tile)
                rows = slice(first, first + source.num_latents)
                targets.offer(rows, starts[at] + block.start, tuple(column.T for column in tile))
        _append(writer, "sources", sources)
        writer.append("fired", goal.fired.cpu().numpy())
    _append(writer, "targets", targets)


def scores(
    path_FD: Tensor, encoder_BD: Tensor, target: Firing, block: slice, source: Firing, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TWERA, ERA, virtual weight and tokens on which both fire, [B, F] each; 0 where the target never fires."""
    weight = encoder_BD @ path_FD.T
    together = Together.count(target, block, source)
    row_E, _, value_E = target.of_block(block)
    activation_B = torch.bincount(row_E, weights=value_E, minlength=block.stop - block.start)[:, None]
    twera = torch.where(activation_B > 0, weight * together.product / activation_B.clamp_min(1e-300), 0.0)
    return twera, weight * together.source_sum / num_tokens, weight, together.both


def blocks(num_targets: int, num_sources: int) -> list[slice]:
    """Target latents of each tile."""
    size = max(1, CELLS // num_sources)
    return [slice(start, min(start + size, num_targets)) for start in range(0, num_targets, size)]


def _append(writer: GlobalWeightsWriter, direction: str, strongest: Strongest) -> None:
    assert direction in DIRECTIONS
    for name, rows in strongest.arrays().items():
        writer.append(f"{direction}/{name}", rows)
