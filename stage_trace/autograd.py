"""The reference engine: the frozen model run once more on PyTorch's tape, one backward pass per target.

It shares with the sweep only what a gradient at an output means (``leaves``); how the gradient gets there is
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
from stage_trace.targets import Targets, reading


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
    outputs = {
        one.output: recording.sites[one.output].detach().clone().requires_grad_() for one in replacement.stand_ins
    }
    skips = {one.output: (one.latents.read, one.skip) for one in replacement.stand_ins if one.skip is not None}
    embedded_TD = recording.sites[HookPoint(0, "resid_pre")].detach().clone().requires_grad_()
    gates = torch.ones(depth + 1, dtype=embedded_TD.dtype, device=embedded_TD.device, requires_grad=True)

    def change(output: HookPoint, _added_TD: Tensor, sites: dict[HookPoint, Tensor]) -> Tensor:
        if output not in skips:
            return outputs[output]
        read, skip = skips[output]
        return outputs[output] + (sites[read] - sites[read].detach()) @ skip.T

    with torch.enable_grad():
        again = run(
            model,
            parts,
            tokens_T,
            [*(one.latents.read for one in replacement.stand_ins), *outputs],
            frozen=recording,
            change=change,
            embed=lambda _: embedded_TD,
            gates=gates,
        )
    rows = Rows(replacement, columns, len(targets), targets.vector_BD)
    T, D = embedded_TD.shape
    count = len(outputs)
    g_OTBD = targets.vector_BD.new_zeros(count, T, len(targets), D)
    g_TBD, bias_BL = torch.zeros_like(g_OTBD[0]), targets.vector_BD.new_zeros(len(targets), depth + 1)
    for row in range(len(targets)):
        with torch.enable_grad():
            is_logit = int(targets.output_B[row]) == count
            seen_D = again.final_TD[-1] if is_logit else reading(targets, replacement, row, again.sites)
            value = seen_D @ targets.vector_BD[row]
        leaves = [*outputs.values(), embedded_TD, gates]
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        for number, g in enumerate(found[:count]):
            if g is not None:
                g_OTBD[number, :, row] = g
        g_TBD[:, row] = found[count]
        if found[count + 1] is not None:
            bias_BL[row] = found[count + 1]
    with torch.no_grad():
        for number in range(count):
            rows.at_output(number, g_OTBD[number])
        rows.at_biases(bias_BL)
        rows.at_tokens(g_TBD, embedded_TD)
    return Swept(rows.values_BS, None)
