"""Forward passes of one prompt that record attention patterns and norm factors, or take them from a recording.

With patterns and factors taken, and each MLP's output given, the residual stream is a linear function of what is given;
so it is where the output of attention is given too:
the local replacement model of Ameisen et al. 2025 (Circuit Tracing), on which attribution graphs stand.

Shapes: T positions, H heads, D = d_model.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.linear_parts import LinearParts, Norm
from shared.lm.places import locate

FROZEN_ATTENTION = "granary_frozen_attention"

NormKey = tuple[int, str]
"""(layer, which norm of it); the final norm is (number of layers, "final")."""
ChangeOutput = Callable[[HookPoint, Tensor, dict[HookPoint, Tensor]], Tensor | None]
"""Of ``mlp_out`` or ``attn_out`` of a layer, what is added there [T, D] and the read sites so far: what is added
instead; None for no change."""


@dataclass(slots=True)
class Recording:
    """What one forward pass has shown; in the model's precision, norm factors in float32 at least."""

    patterns: list[Tensor] = field(default_factory=list)
    """Per layer [H, T, T], rows are queries."""
    scales: dict[NormKey, Tensor] = field(default_factory=dict)
    """[T, 1] per norm."""
    sites: dict[HookPoint, Tensor] = field(default_factory=dict)
    """[T, D] of the sites that were asked for, and of ``mlp_out`` of every layer and ``resid_pre`` of layer 0."""
    final_TD: Tensor = field(default_factory=lambda: torch.empty(0))
    """The stream behind the final norm."""
    logits_V: Tensor = field(default_factory=lambda: torch.empty(0))
    """Logits at the last position, as the model gives them, softcapped where it does."""


def run(
    model: PreTrainedModel,
    parts: LinearParts,
    tokens_T: Tensor,
    sites: Sequence[HookPoint] = (),
    *,
    frozen: Recording | None = None,
    change: ChangeOutput | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    gates: Tensor | None = None,
) -> Recording:
    """One forward pass over `tokens_T`; records `sites` beside what it always records.

    frozen      patterns and factors are taken from this recording; they are constants to autograd. One without patterns
                leaves attention free
    change      what an MLP adds is replaced by what this gives; what attention adds where `sites` has its ``attn_out``
    embed       what goes into the first layer is replaced by what this makes of it
    gates       [L + 1]: factors of the biases of each layer's norms and attention, and of the final norm's
    """
    with _hooked(model, parts, sites, frozen, change, embed, gates) as recording:
        passed = _Attend(recording, frozen)
        # The logits of the last position alone: of all they may be more than all else together.
        logits = model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=1, frozen_pass=passed).logits
        recording.logits_V = logits[0, -1]
    return recording


@dataclass(slots=True)
class _Attend:
    """What reaches the attention function of each layer."""

    recording: Recording
    frozen: Recording | None

    def pattern(self, layer: int, compute: Callable[[], Tensor]) -> Tensor:
        """The pattern [H, T, T] to use, which is recorded."""
        held = [] if self.frozen is None else self.frozen.patterns
        pattern = held[layer] if held else compute()
        self.recording.patterns.append(pattern.detach())
        return pattern.detach()


def frozen_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    *,
    frozen_pass: _Attend,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention with a pattern that is recorded or given; [1, T, H, E] and the pattern."""
    groups = query_BHTE.shape[1] // key_BKTE.shape[1]

    def compute() -> Tensor:
        keys_HTE = key_BKTE[0].repeat_interleave(groups, 0)
        factor = query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling
        scores_HTT = (query_BHTE[0] @ keys_HTE.transpose(1, 2)).mul_(factor)  # in place: T^2 is large
        if softcap is not None:
            scores_HTT = scores_HTT.div_(softcap).tanh_().mul_(softcap)
        if attention_mask is not None:
            scores_HTT.add_(attention_mask[0])
        wide = torch.promote_types(scores_HTT.dtype, torch.float32)
        return torch.softmax(scores_HTT, -1, dtype=wide).to(value_BKTE.dtype)

    layer = module.layer_idx
    assert isinstance(layer, int)
    pattern_HTT = frozen_pass.pattern(layer, compute)
    mixed_HTE = pattern_HTT @ value_BKTE[0].repeat_interleave(groups, 0)
    return mixed_HTE.transpose(0, 1)[None], pattern_HTT[None]


AttentionInterface.register(FROZEN_ATTENTION, frozen_attention)
AttentionMaskInterface.register(FROZEN_ATTENTION, eager_mask)


@contextmanager
def _hooked(
    model: PreTrainedModel,
    parts: LinearParts,
    sites: Sequence[HookPoint],
    frozen: Recording | None,
    change: ChangeOutput | None,
    embed: Callable[[Tensor], Tensor] | None,
    gates: Tensor | None,
) -> Any:
    """`model` with the hooks of one pass; outside it is what it was."""
    recording = Recording()
    depth = len(parts.layers)
    with ExitStack() as stack:
        stack.enter_context(_attention(model))

        def norm(key: NormKey, norm: Norm) -> None:
            fn = partial(_freeze_norm, recording, frozen, key, norm, 1.0 if gates is None else gates[key[0]])
            stack.callback(norm.module.register_forward_hook(fn).remove)

        for layer, part in enumerate(parts.layers):
            norm((layer, "attention"), part.attention_norm)
            norm((layer, "mlp"), part.mlp_norm)
            if part.output_norm is not None:
                norm((layer, "output"), part.output_norm)
            if gates is not None:
                for linear in (part.heads.values, part.heads.output):
                    if linear.bias is not None:
                        fn = partial(_gate_bias, linear.bias, gates[layer])
                        stack.callback(linear.register_forward_hook(fn).remove)
        norm((depth, "final"), parts.final_norm)

        first = HookPoint(0, "resid_pre")
        at_first = partial(_see, recording, first, None if embed is None else embed)
        stack.callback(hook_at(locate(model, first), at_first).remove)
        for hook in dict.fromkeys([*sites, *(HookPoint(layer, "mlp_out") for layer in range(depth))]):
            if hook != first:
                at_hook = None
                if change is not None and hook.site in ("attn_out", "mlp_out"):
                    at_hook = partial(_changed, change, hook, recording)
                stack.callback(hook_at(locate(model, hook), partial(_see, recording, hook, at_hook)).remove)

        def keep_final(_module: nn.Module, _args: Any, output: Tensor) -> None:
            recording.final_TD = output[0]

        stack.callback(parts.final_norm.module.register_forward_hook(keep_final).remove)
        yield recording


def _see(recording: Recording, hook: HookPoint, change: Callable[[Tensor], Tensor | None] | None, x: Tensor) -> Any:
    changed = None if change is None else change(x[0])
    recording.sites[hook] = x[0] if changed is None else changed
    return None if changed is None else changed[None]


def _changed(change: ChangeOutput, output: HookPoint, recording: Recording, added_TD: Tensor) -> Tensor | None:
    return change(output, added_TD, recording.sites)


def _freeze_norm(
    recording: Recording,
    frozen: Recording | None,
    key: NormKey,
    norm: Norm,
    gate: Tensor | float,
    _module: nn.Module,
    args: tuple[Tensor, ...],
    _output: Tensor,
) -> Tensor:
    x = args[0]
    scale = norm.scale(x[0]).detach() if frozen is None else frozen.scales[key]
    recording.scales[key] = scale
    return norm.apply(x, scale, gate)


def _gate_bias(bias: Tensor, gate: Tensor, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + (gate - 1) * bias


@contextmanager
def _attention(model: PreTrainedModel) -> Any:
    """`model` runs `frozen_attention`; afterwards what it ran before."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PretrainedConfig)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = FROZEN_ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
