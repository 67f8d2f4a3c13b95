"""The reverse sweep: gradients of many targets at once, layer by layer from the top, without a tape.

It needs the frozen patterns and norm factors of a recording and the weights of one layer at a time. Within a layer the
order is: score the MLP's output with the gradient that arrives; the skip; targets that read here; attention.
Shapes: B targets, T positions up to the last target's, D = d_model, H heads, K key/value heads, E head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.frozen import Recording
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LinearLayer, LinearParts
from stage_trace.leaves import Columns, Rows
from stage_trace.replacement import Replacement
from stage_trace.targets import Targets


@dataclass(frozen=True, slots=True)
class Swept:
    """What an engine gives for a batch of targets."""

    rows_BS: Tensor
    heads_BLH: Tensor | None
    """Of each target's sum, what has passed through each head of each layer, counted wherever it passes."""


@torch.no_grad()
def sweep(
    parts: LinearParts, recording: Recording, replacement: Replacement, columns: Columns, targets: Targets
) -> Swept:
    """The rows of `targets`; the recording must hold ``attn_in`` of every layer."""
    B, T = len(targets), int(targets.position_B.max()) + 1
    vector_BD = targets.vector_BD
    rows = Rows(replacement, columns, B, vector_BD)
    depth = len(parts.layers)
    bias_BL = vector_BD.new_zeros(B, depth + 1)
    heads = []

    g_BTD = _injected(targets, targets.layer_B == depth, T)
    final = parts.final_norm
    if final.bias_D is not None:
        bias_BL[:, depth] = torch.einsum("btd,d->b", g_BTD, final.bias_D.to(g_BTD))
    g_BTD = final.pull_back(g_BTD, recording.scales[depth, "final"][:T])
    for layer in reversed(range(depth)):
        part, stand_in = parts.layers[layer], replacement.layers[layer]
        rows.at_mlp(layer, g_BTD)
        read = stand_in.latents.read.site
        read_BTD = _injected(targets, targets.layer_B == layer, T)
        if stand_in.skip is not None:
            read_BTD += g_BTD @ stand_in.skip
        before_BTD = g_BTD
        if read == "mlp_in":
            norm = part.mlp_norm
            if norm.bias_D is not None:
                bias_BL[:, layer] += torch.einsum("btd,d->b", read_BTD, norm.bias_D.to(g_BTD))
            read_BTD = norm.pull_back(read_BTD, recording.scales[layer, "mlp"][:T])
        # Where the branches are parallel, what the MLP reads comes before attention; so does resid_pre.
        is_before = part.is_parallel or read == "resid_pre"
        if not is_before:
            before_BTD = g_BTD + read_BTD
        attended_BTD, bias_B, heads_BH = _through_attention(part, recording, layer, before_BTD)
        bias_BL[:, layer] += bias_B
        heads.append(heads_BH)
        g_BTD = before_BTD + attended_BTD
        if is_before:
            g_BTD = g_BTD + read_BTD
    rows.at_biases(bias_BL)
    rows.at_tokens(g_BTD, recording.sites[HookPoint(0, "resid_pre")])
    return Swept(rows.values_BS, torch.stack(heads[::-1], 1))


def _injected(targets: Targets, chosen_B: Tensor, T: int) -> Tensor:
    """[B, T, D]: each chosen target's vector at its position."""
    g_BTD = targets.vector_BD.new_zeros(len(targets), T, targets.vector_BD.shape[1])
    chosen = torch.nonzero(chosen_B).flatten()
    g_BTD[chosen, targets.position_B[chosen]] = targets.vector_BD[chosen]
    return g_BTD


def _through_attention(
    part: LinearLayer, recording: Recording, layer: int, g_BTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient at the layer's input by way of attention, what its biases give [B], and what each head gives [B, H]."""
    T, heads = g_BTD.shape[1], part.heads
    if part.output_norm is not None:
        g_BTD = part.output_norm.pull_back(g_BTD, recording.scales[layer, "output"][:T])
    W_V_KED, W_O_HDE = heads.W_V_KED.to(g_BTD), heads.W_O_HDE.to(g_BTD)
    pattern_HTT = recording.patterns[layer][:, :T, :T].to(g_BTD)
    mixed_BHTE = torch.einsum("btd,hde->bhte", g_BTD, W_O_HDE)
    values_BHTE = torch.einsum("hts,bhte->bhse", pattern_HTT, mixed_BHTE)  # @ would copy the pattern for every target
    values_BKTE = values_BHTE.reshape(len(g_BTD), -1, heads.per_group, *values_BHTE.shape[2:]).sum(2)
    inputs_BTD = torch.einsum("bkte,ked->btd", values_BKTE, W_V_KED)

    norm = part.attention_norm
    bias_B = g_BTD.new_zeros(len(g_BTD))
    value_KTE = torch.einsum("td,ked->kte", recording.sites[HookPoint(layer, "attn_in")][:T].to(g_BTD), W_V_KED)
    if heads.b_V_KE is not None:
        bias_B += torch.einsum("bkte,ke->b", values_BKTE, heads.b_V_KE.to(g_BTD))
        value_KTE = value_KTE + heads.b_V_KE.to(g_BTD)[:, None]
    if heads.b_O_D is not None:
        bias_B += torch.einsum("btd,d->b", g_BTD, heads.b_O_D.to(g_BTD))
    if norm.bias_D is not None:
        bias_B += torch.einsum("btd,d->b", inputs_BTD, norm.bias_D.to(g_BTD))
    heads_BH = torch.einsum("bhte,hte->bh", values_BHTE, value_KTE.repeat_interleave(heads.per_group, 0))
    return norm.pull_back(inputs_BTD, recording.scales[layer, "attention"][:T]), bias_B, heads_BH
