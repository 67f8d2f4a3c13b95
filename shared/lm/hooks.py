"""Reading and replacing activations of a decoder.

A hook point is found by module, never by editing the model's code. Where each one is:

    resid_pre   input of decoder layer L                (of the final norm, when L layers were loaded)
    resid_post  output of decoder layer L
    attn_out    what attention adds to the residual     (Gemma: after its post-attention norm)
    mlp_in      input of the MLP, that is after the norm before it
    mlp_out     what the MLP adds to the residual       (Gemma: after its post-feedforward norm)

Hence ``resid_post = resid_pre + attn_out + mlp_out`` in every supported family.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint

# Families whose layers were read and are tested here. Others may scale what a branch adds (Granite) or fuse branches.
BRANCH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox")

Side = Literal["input", "output"]


class Location(NamedTuple):
    """Where an activation passes: into or out of a module."""

    module: nn.Module
    side: Side


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a transformers model, with or without its LM head.

    Raises GranaryError when there is none to be found.
    """
    blocks = getattr(_trunk(model), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise GranaryError(f"{type(model).__name__} has no list of decoder layers that hooks could be placed on")
    return blocks


def final_norm(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the norm after the last layer, and the norm's attribute name there."""
    trunk = _trunk(model)
    for name in ("norm", "final_layer_norm"):
        if isinstance(getattr(trunk, name, None), nn.Module):
            return trunk, name
    raise GranaryError(f"{type(model).__name__} has no final norm that hooks know of")


def needed_depth(hooks: Sequence[HookPoint]) -> tuple[int, bool]:
    """(layers to load, whether the last of them needs its MLP) so that every hook is computed and nothing after it.

    ``resid_pre`` of layer L needs the L layers before it; at least one layer is always loaded.
    """
    depth = max(hook.layer if hook.site == "resid_pre" else hook.layer + 1 for hook in hooks)
    depth = max(depth, 1)
    in_last = {hook.site for hook in hooks if hook.layer == depth - 1}
    beyond_last = any(hook.layer == depth for hook in hooks)
    return depth, beyond_last or bool(in_last & {"resid_post", "mlp_in", "mlp_out"})


def check_hooks(config: PretrainedConfig, hooks: Sequence[HookPoint]) -> None:
    """Raise GranaryError if a model of this configuration lacks one of `hooks`; allocates no weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for hook in hooks:
        _locate(model, hook)


@contextmanager
def capture(model: nn.Module, hooks: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
    """Within the context, each forward of `model` fills the yielded dict: hook -> [B, T, d_model], as computed.

    The tensors are the model's own (no copy, no detach). Hooks are removed on exit, also by an exception.
    """
    captured: dict[HookPoint, Tensor] = {}
    with ExitStack() as stack:
        for hook in hooks:

            def keep(activation: Tensor, hook: HookPoint = hook) -> None:
                captured[hook] = activation

            stack.callback(_attach(_locate(model, hook), keep).remove)
        yield captured


@contextmanager
def splice(model: nn.Module, hook: HookPoint, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, each forward of `model` continues from ``fn(activation)`` instead of the activation.

    `fn` gets [B, T, d_model] in the model's dtype; its result is cast back to that dtype and must have that shape.
    """

    def replace(activation: Tensor) -> Tensor:
        replacement = fn(activation)
        if replacement.shape != activation.shape:  # a shape that broadcasts would go on unnoticed
            raise ValueError(f"splice at {hook}: {tuple(replacement.shape)} in place of {tuple(activation.shape)}")
        return replacement.to(activation.dtype)

    handle = _attach(_locate(model, hook), replace)
    try:
        yield
    finally:
        handle.remove()


def _attach(location: Location, fn: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
    """Call `fn` on the activation at `location`; a tensor it returns takes the activation's place."""

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            replacement = fn(output[0])
            return None if replacement is None else (replacement, *output[1:])
        return fn(output)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        activation = args[0] if args else kwargs["hidden_states"]
        replacement = fn(activation)
        if replacement is None:
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replacement}

    if location.side == "output":
        return location.module.register_forward_hook(on_output)
    return location.module.register_forward_pre_hook(on_input, with_kwargs=True)


def _locate(model: nn.Module, hook: HookPoint) -> Location:
    blocks = decoder_blocks(model)
    if hook.layer == len(blocks) and hook.site == "resid_pre":
        holder, name = final_norm(model)
        return Location(getattr(holder, name), "input")
    if hook.layer >= len(blocks):
        raise GranaryError(f"{hook} is not in the model: it has {len(blocks)} layers, 0 to {len(blocks) - 1}")
    block = blocks[hook.layer]
    if hook.site == "resid_pre":
        return Location(block, "input")
    if hook.site == "resid_post":
        return Location(block, "output")
    family = getattr(_trunk(model).config, "model_type", type(model).__name__)
    if family not in BRANCH_FAMILIES:
        raise GranaryError(
            f"{hook}: attention and MLP hooks are known for {', '.join(BRANCH_FAMILIES)}, not for {family};"
            " resid_pre and resid_post work there"
        )
    is_sandwich = hasattr(block, "post_feedforward_layernorm")  # Gemma norms each branch's output before adding it
    match hook.site:
        case "attn_out" if is_sandwich:
            return Location(block.get_submodule("post_attention_layernorm"), "output")
        case "attn_out":
            return Location(block.get_submodule("attention" if family == "gpt_neox" else "self_attn"), "output")
        case "mlp_out" if is_sandwich:
            return Location(block.get_submodule("post_feedforward_layernorm"), "output")
        case "mlp_out":
            return Location(block.get_submodule("mlp"), "output")
        case _:
            return Location(block.get_submodule("mlp"), "input")


def _trunk(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return model.base_model if isinstance(model, PreTrainedModel) else model
