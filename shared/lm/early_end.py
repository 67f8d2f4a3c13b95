"""Which models' forwards may be broken off in the middle, as soon as all that is wanted has been computed."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

# Whose hooks do nothing that the end of a forward would have to undo.
KNOWN_HOOKS = ("shared.", "transformers.")


def may_end_early(model: nn.Module) -> bool:
    """Whether it does no harm, and loses nothing, that an exception ends a forward of `model` behind some module.

    That holds for models of transformers, which run their layers in a fixed order. It does not where weights are put
    back into their places behind each layer (FSDP, tensor parallelism, ZeRO, offloading by accelerate), nor where
    somebody else waits for what is computed later, by hooks of their own.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters()):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) or hasattr(module, "_hf_hook"):
            return False
        if not all(map(_is_known, _hooks_of(module))):
            return False
    return True


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _is_known(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    return str(getattr(function, "__module__", "")).startswith(KNOWN_HOOKS)
