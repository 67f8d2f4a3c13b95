"""The reverse sweep: gradients of many targets at once, layer by layer from the top, without a tape.

It needs the frozen patterns and norm factors of a recording and the weights of one layer at a time. Within a layer the
order is: score the MLP's output with the gradient that arrives; the skip; targets that read here; attention, head by
head, or where a Lorsa stands in for it: score its output, then what the Lorsa's latents among the targets read of
earlier positions. Positions come first in every tensor, so that what a pattern does is one product over all targets.
Shapes: B targets, T positions up to the last target's, D = d_model, H heads, K key/value heads, E head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearLayer, LinearParts, Norm
from stage_trace.leaves import Columns, Rows
from stage_trace.replacement import Replacement, StandIn
from stage_trace.targets import Targets

SeeHead = Callable[[int, int, Tensor], None]
"""Of a layer and a head: the gradient of its values [T, B, E]."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What an engine gives for a batch of targets."""

    rows_BS: Tensor
    heads_BLH: Tensor | None
    """Of each target's sum, what has passed through each head of each layer, counted wherever it passes."""


@torch.no_grad()
def sweep(
    parts: LinearParts,
    recording: Recording,
    replacement: Replacement,
    columns: Columns,
    targets: Targets,
    see_head: SeeHead | None = None,
) -> Swept:
    """The rows of `targets`; the recording must hold ``attn_in`` of every layer. `see_head` is shown every head."""
    B, T = len(targets), int(targets.position_B.max()) + 1
    rows = Rows(replacement, columns, B, targets.vector_BD)
    depth = len(parts.layers)
    bias_BL = targets.vector_BD.new_zeros(B, depth + 1)
    heads_BLH = targets.vector_BD.new_zeros(B, depth, len(parts.layers[0].heads.W_O_HDE))

    g_TBD = targets.vector_BD.new_zeros(T, B, targets.vector_BD.shape[1])
    number_of = {output: number for number, output in enumerate(replacement.outputs)}

    def past_attention(layer: int) -> tuple[Tensor, Tensor]:
        part, number = parts.layers[layer], number_of.get(HookPoint(layer, "attn_out"))
        if number is None:
            return _through_attention(part, recording, layer, g_TBD, heads_BLH[:, layer], see_head)
        rows.at_output(number, g_TBD)
        return _to_what_attention_reads(g_TBD, part, replacement.stand_ins[number], recording, number, targets)

    last = torch.nonzero(targets.output_B == len(number_of)).flatten()
    if parts.final_norm.bias_D is not None:
        bias_BL[last, depth] = targets.vector_BD[last] @ parts.final_norm.bias_D.to(g_TBD)
    _inject(g_TBD, targets, last, parts.final_norm, recording.scales[depth, "final"])
    for layer in reversed(range(depth)):
        part, number = parts.layers[layer], number_of[HookPoint(layer, "mlp_out")]
        stand_in = replacement.stand_ins[number]
        rows.at_output(number, g_TBD)
        # Where the branches are parallel, what the MLP reads comes before attention; so does resid_pre.
        is_before = part.is_parallel or stand_in.latents.read.site == "resid_pre"
        attended = past_attention(layer) if is_before else None
        bias_BL[:, layer] += _to_what_the_mlp_reads(g_TBD, part, stand_in, recording, number, targets)
        attended_TBD, bias_B = past_attention(layer) if attended is None else attended
        bias_BL[:, layer] += bias_B
        g_TBD += attended_TBD
        del attended, attended_TBD
    rows.at_biases(bias_BL)
    rows.at_tokens(g_TBD, recording.sites[HookPoint(0, "resid_pre")])
    return Swept(rows.values_BS, heads_BLH)


def _to_what_the_mlp_reads(
    g_TBD: Tensor, part: LinearLayer, stand_in: StandIn, recording: Recording, number: int, targets: Targets
) -> Tensor:
    """Add to `g_TBD` what reaches the stream by the skip, and the targets that read here; what a norm's bias gives."""
    norm, scale_T1 = None, None
    if stand_in.latents.read.site == "mlp_in":
        norm, scale_T1 = part.mlp_norm, recording.scales[stand_in.output.layer, "mlp"]
    here = torch.nonzero(targets.output_B == number).flatten()
    bias_B = g_TBD.new_zeros(len(targets))
    read_TBD = None if stand_in.skip is None else g_TBD @ stand_in.skip
    if norm is not None and norm.bias_D is not None:
        bias_B[here] += targets.vector_BD[here] @ norm.bias_D.to(g_TBD)
        if read_TBD is not None:
            bias_B += read_TBD.sum(0) @ norm.bias_D.to(g_TBD)
    if read_TBD is not None:
        g_TBD += read_TBD if norm is None else _pull_back_(norm, read_TBD, scale_T1)
    _inject(g_TBD, targets, here, norm, scale_T1)
    return bias_B


def _to_what_attention_reads(
    like_TBD: Tensor, part: LinearLayer, stand_in: StandIn, recording: Recording, number: int, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Gradient at the layer's input of the targets that are latents of a Lorsa there, each spread over the positions
    that it attends to; and what the norm's bias gives [B]."""
    norm, latents = part.attention_norm, stand_in.latents
    read_TBD, bias_B = torch.zeros_like(like_TBD), like_TBD.new_zeros(len(targets))
    here = torch.nonzero(targets.output_B == number).flatten()
    if len(here):
        assert latents.patterns is not None
        pattern_nT = latents.patterns.of(targets.latent_B[here], targets.position_B[here], like_TBD)
        pattern_nT = pattern_nT[:, : len(like_TBD)]
        for position, attended_n in enumerate(pattern_nT.T):
            read_TBD[position, here] = attended_n[:, None] * targets.vector_BD[here]
        if norm.bias_D is not None:
            bias_B[here] = pattern_nT.sum(1) * (targets.vector_BD[here] @ norm.bias_D.to(like_TBD))
    return _pull_back_(norm, read_TBD, recording.scales[stand_in.output.layer, "attention"]), bias_B


def _inject(g_TBD: Tensor, targets: Targets, chosen: Tensor, norm: Norm | None, scale_T1: Tensor | None) -> None:
    """Add each chosen target's vector at its position, through the norm that it reads behind."""
    vector_BD, position_B = targets.vector_BD[chosen], targets.position_B[chosen]
    if norm is not None and scale_T1 is not None:
        vector_BD = norm.pull_back(vector_BD, scale_T1[position_B])
    g_TBD[position_B, chosen] += vector_BD


def _pull_back_(norm: Norm, g_TBD: Tensor, scale_T1: Tensor | None) -> Tensor:
    """``norm.pull_back`` in place."""
    assert scale_T1 is not None
    g_TBD.mul_(norm.weight_D.to(g_TBD)).mul_(scale_T1[: len(g_TBD), :, None].to(g_TBD))
    if norm.is_centred:
        g_TBD.sub_(g_TBD.mean(-1, keepdim=True))
    return g_TBD


def _through_attention(
    part: LinearLayer, recording: Recording, layer: int, g_TBD: Tensor, heads_BH: Tensor, see_head: SeeHead | None
) -> tuple[Tensor, Tensor]:
    """Gradient at the layer's input by way of attention, and what its biases give [B]; `heads_BH` is filled."""
    T, B, D = g_TBD.shape
    heads, norm = part.heads, part.attention_norm
    if part.output_norm is not None:
        g_TBD = _pull_back_(part.output_norm, g_TBD.clone(), recording.scales[layer, "output"])
    bias_B = g_TBD.new_zeros(B)
    if heads.b_O_D is not None:
        bias_B += g_TBD.sum(0) @ heads.b_O_D.to(g_TBD)
    input_TD = recording.sites[HookPoint(layer, "attn_in")][:T].to(g_TBD)
    flat_ND, attended_ND = g_TBD.view(T * B, D), g_TBD.new_zeros(T * B, D)
    for key, W_V_ED in enumerate(heads.W_V_KED.to(g_TBD)):
        value_TE = input_TD @ W_V_ED.T
        if heads.b_V_KE is not None:
            value_TE = value_TE + heads.b_V_KE[key].to(g_TBD)
        summed_NE = None
        for head in range(key * heads.per_group, (key + 1) * heads.per_group):
            mixed_NE = flat_ND @ heads.W_O_HDE[head].to(g_TBD)
            pattern_TT = recording.patterns[layer][head, :T, :T].to(g_TBD)
            values_TBE = (pattern_TT.T @ mixed_NE.view(T, -1)).view(T, B, -1)
            del mixed_NE
            heads_BH[:, head] = torch.einsum("tbe,te->b", values_TBE, value_TE)
            if see_head is not None:
                see_head(layer, head, values_TBE)
            values_NE = values_TBE.view(T * B, -1)
            summed_NE = values_NE if summed_NE is None else summed_NE.add_(values_NE)
        assert summed_NE is not None
        if heads.b_V_KE is not None:
            bias_B += summed_NE.view(T, B, -1).sum(0) @ heads.b_V_KE[key].to(g_TBD)
        attended_ND.addmm_(summed_NE, W_V_ED)
    attended_TBD = attended_ND.view(T, B, D)
    if norm.bias_D is not None:
        bias_B += attended_TBD.sum(0) @ norm.bias_D.to(g_TBD)
    return _pull_back_(norm, attended_TBD, recording.scales[layer, "attention"]), bias_B
