"""Reading activations; `shared.lm.places` says where each is, `shared.lm.splicing` replaces them. Of a decoder:

    resid_pre   input of decoder layer L
    attn_in     input of attention, that is after the norm before it
    attn_out    what attention adds to the residual     (Gemma: after its post-attention norm)
    resid_mid   the stream between attention and MLP    (not where the two are parallel: Pythia, Phi)
    mlp_in      input of the MLP, that is after the norm before it
    mlp_out     what the MLP adds to the residual       (Gemma: after its post-feedforward norm)
    resid_post  output of decoder layer L

Hence ``resid_post = resid_pre + attn_out + mlp_out`` in every supported family.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint
from shared.lm.modulepoint import Point
from shared.lm.places import Location, locate

P = TypeVar("P", bound=Point)
# Of activations with more axes than rows, positions and features, where the features lie is a guess.
CLEAR_DIMS = 3
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
def capture(model: nn.Module, points: Sequence[P]) -> Iterator[dict[P, Tensor]]:
    """Within the context, each forward of `model` fills the yielded dict: place -> [..., features], as computed.

    At a hook of a decoder that is [B, T, d_model]. The tensors are the model's own (no copy, no detach). Hooks are
    removed on exit, also by an exception.
    """
    captured: dict[P, Tensor] = {}
    with ExitStack() as stack:
        for point in points:

            def keep(activation: Tensor, point: P = point) -> None:
                captured[point] = activation

            stack.callback(hook_at(locate(model, point), keep).remove)
        yield captured


def hook_at(location: Location, fn: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
    """Call `fn` on the activation at `location`, features last; a tensor it returns takes the activation's place.

    The forward raises GranaryError where there is no tensor at the place, or its axis of features is in doubt.
    """

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _features_last(_tensor(output if not location.select else None, output, location), location, fn)
        key = key_of(output, location.select)
        activation = _tensor(None if key is None else output[key], output, location)
        replacement = _features_last(activation, location, fn)
        return None if replacement is None else exchanged(output, key, replacement)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Any = args if args and not isinstance(location.select, str) else kwargs
        key = key_of(args, location.select) if given is args else _keyword(kwargs, location)
        activation = _tensor(None if key is None else given[key], given, location)
        replacement = _features_last(activation, location, fn)
        if replacement is None:
            return None
        if given is args:
            return exchanged(args, key, replacement), kwargs
        return args, exchanged(kwargs, key, replacement)

    if location.side == "output":
        handle = location.module.register_forward_hook(on_output)
        _put_recorders_last(location.module)
        return handle
    return location.module.register_forward_pre_hook(on_input, with_kwargs=True)


def _put_recorders_last(module: nn.Module) -> None:
    """Move the hooks by which transformers itself records hidden states behind those that may replace them.

    It leaves them on a model for good at its first forward. What they record may go on: LLaVA's vision features do.
    """
    hooks = module._forward_hooks
    for number, hook in list(hooks.items()):
        if getattr(hook, "__module__", "").startswith("transformers."):
            hooks[number] = hooks.pop(number)


def key_of(output: Any, select: int | str | None) -> Any:
    """What a tuple, list or mapping holds its selected element under; None where it holds none such."""
    keys = list(output) if isinstance(output, Mapping) else list(range(len(output))) if _is_row(output) else []
    if isinstance(select, str):
        return select if select in keys else None
    place = select or 0
    return keys[place] if place < len(keys) else None


def exchanged(output: Any, key: Any, value: Tensor) -> Any:
    """A copy of a tuple, list or mapping with another element under `key`, of the same type."""
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[key] = value
        return changed
    items = [value if place == key else item for place, item in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _is_row(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _keyword(kwargs: Mapping[str, Any], location: Location) -> str | None:
    """The named argument that is meant: the selected one, ``hidden_states``, or the only one of float numbers."""
    floats = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    wanted = "hidden_states" if location.select is None else str(location.select)
    if wanted in floats:
        return wanted
    return floats[0] if location.select is None and len(floats) == 1 else None


def _tensor(value: Any, whole: Any, location: Location) -> Tensor:
    """`value`; raises GranaryError that says what there is where it is no tensor of float numbers."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    named = whole.items() if isinstance(whole, Mapping) else enumerate(whole) if _is_row(whole) else ()
    tensors = [str(name) for name, one in named if isinstance(one, Tensor) and one.is_floating_point()]
    side = "in" if location.side == "input" else "out"
    choice = f": choose {' or '.join(f':{side}[{name}]' for name in tensors)}" if tensors else ""
    what = "goes into" if location.side == "input" else "comes out of"
    which = "that" if location.select is None else f"at [{location.select}] of what"
    raise GranaryError(f"there is no tensor of activations {which} {what} {_name(location)}{choice}")


def _features_last(activation: Tensor, location: Location, fn: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """What `fn` makes of `activation`, for which the features lie along the last axis."""
    axis = location.axis
    if axis is None and activation.dim() > CLEAR_DIMS:
        raise GranaryError(
            f"{_name(location)} has activations {list(activation.shape)}, and which axis holds the features is not"
            " clear: write @1 after its name for channels first, @-1 for channels last"
        )
    if axis is None or axis == -1:
        return fn(activation)
    if not -activation.dim() <= axis < activation.dim():
        raise GranaryError(f"{_name(location)} has activations {list(activation.shape)}, without an axis {axis}")
    replacement = fn(activation.movedim(axis, -1))
    return None if replacement is None else replacement.movedim(-1, axis)


def _name(location: Location) -> str:
    return f"the {type(location.module).__name__}"
