"""Reading activations of a decoder; `shared.lm.places` says where each is, `shared.lm.splicing` replaces them.

    resid_pre   input of decoder layer L
    attn_in     input of attention, that is after the norm before it
    attn_out    what attention adds to the residual     (Gemma: after its post-attention norm)
    resid_mid   the stream between attention and MLP    (not where the two are parallel: Pythia, Phi)
    mlp_in      input of the MLP, that is after the norm before it
    mlp_out     what the MLP adds to the residual       (Gemma: after its post-feedforward norm)
    resid_post  output of decoder layer L

Hence ``resid_post = resid_pre + attn_out + mlp_out`` in every supported family.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from shared.lm.hookpoint import HookPoint
from shared.lm.places import Location, locate

# Sites that are computed before the MLP of their layer runs.
BEFORE_MLP = {"resid_pre", "attn_in", "attn_out", "resid_mid"}


def needed_depth(hooks: Sequence[HookPoint]) -> tuple[int, bool]:
    """(layers to load, whether the last of them needs its MLP) so that every hook is computed and nothing after it.

    ``resid_pre`` of layer L needs the L layers before it; at least one layer is always loaded.
    """
    depth = max(hook.layer if hook.site == "resid_pre" else hook.layer + 1 for hook in hooks)
    depth = max(depth, 1)
    in_last = {hook.site for hook in hooks if hook.layer == depth - 1}
    beyond_last = any(hook.layer == depth for hook in hooks)
    return depth, beyond_last or bool(in_last - BEFORE_MLP)


def check_hooks(config: PretrainedConfig, hooks: Sequence[HookPoint]) -> None:
    """Raise GranaryError if a model of this configuration lacks one of `hooks`; allocates no weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    for hook in hooks:
        locate(model, hook)


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

            stack.callback(attach(locate(model, hook), keep).remove)
        yield captured


def attach(location: Location, fn: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
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
