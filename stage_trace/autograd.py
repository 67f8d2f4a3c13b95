"""The reference engine: the frozen model run once more on PyTorch's tape, one backward pass per target.

It shares with the sweep only what a gradient at an MLP's output means (``leaves``); how the gradient gets there is
left to autograd and the model's own code.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.lm.frozen import Recording, run
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearParts
from stage_trace.leaves import Columns, Rows
from stage_trace.replacement import Replacement
from stage_trace.sweep import Swept
from stage_trace.targets import Targets, site_of


def by_autograd(
    model: PreTrainedModel,
    parts: LinearParts,
    tokens_T: Tensor,
    recording: Recording,
    replacement: Replacement,
    columns: Columns,
    targets: Targets,
) -> Swept:
    """The rows of `targets`, as ``sweep`` gives them."""
    depth = len(parts.layers)
    outputs = [recording.mlp_out(layer).detach().clone().requires_grad_() for layer in range(depth)]
    embedded_TD = recording.sites[HookPoint(0, "resid_pre")].detach().clone().requires_grad_()
    gates = torch.ones(depth + 1, dtype=embedded_TD.dtype, device=embedded_TD.device, requires_grad=True)

    def change_mlp(layer: int, _added_TD: Tensor, sites: dict[HookPoint, Tensor]) -> Tensor:
        stand_in = replacement.layers[layer]
        if stand_in.skip is None:
            return outputs[layer]
        read_TD = sites[stand_in.latents.read]
        return outputs[layer] + (read_TD - read_TD.detach()) @ stand_in.skip.T

    with torch.enable_grad():
        again = run(
            model,
            parts,
            tokens_T,
            [layer.latents.read for layer in replacement.layers],
            frozen=recording,
            change_mlp=change_mlp,
            embed=lambda _: embedded_TD,
            gates=gates,
        )
    rows = Rows(replacement, columns, len(targets), targets.vector_BD)
    T, D = embedded_TD.shape
    g_LTBD = targets.vector_BD.new_zeros(depth, T, len(targets), D)
    g_TBD, bias_BL = torch.zeros_like(g_LTBD[0]), targets.vector_BD.new_zeros(len(targets), depth + 1)
    for row in range(len(targets)):
        site = site_of(targets, replacement, row)
        stream_TD = again.final_TD if site is None else again.sites[site]
        with torch.enable_grad():
            reading = stream_TD[int(targets.position_B[row])] @ targets.vector_BD[row]
        found = torch.autograd.grad(reading, [*outputs, embedded_TD, gates], retain_graph=True, allow_unused=True)
        for layer, g in enumerate(found[:depth]):
            if g is not None:
                g_LTBD[layer, :, row] = g
        g_TBD[:, row] = found[depth]
        if found[depth + 1] is not None:
            bias_BL[row] = found[depth + 1]
    with torch.no_grad():
        for layer in range(depth):
            rows.at_mlp(layer, g_LTBD[layer])
        rows.at_biases(bias_BL)
        rows.at_tokens(g_TBD, embedded_TD)
    return Swept(rows.values_BS, None)
