"""Loading a model: the trunk as far as the deepest hook for harvesting, the whole of it for evaluation."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError, told_of
from shared.lm.families import family_of
from shared.lm.identity import load_config, load_trunk_config, quiet_transformers, resolve_model
from shared.lm.packed import DOCUMENT_SDPA
from shared.lm.places import decoder_blocks, final_norm
from shared.lm.quantised import quantisation_config
from shared.lm.rope import rotate_by_document
from shared.lm.tensor_parallel import check_tensor_parallel, sharded_class, tensor_parallel_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_trunk(
    path: str,
    dtype: torch.dtype | str = "float32",
    *,
    num_layers: int | None = None,
    last_mlp: bool = True,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    tp_mesh: DeviceMesh | None = None,
    quantisation: str | None = None,
) -> PreTrainedModel:
    """The first `num_layers` decoder layers (None: all) without final norm and LM head, in evaluation mode.

    Weights of later layers and of the head are not read from disk. The forward's ``last_hidden_state`` is the residual
    stream after the last loaded layer, since the final norm is an Identity. Of a vision-language model the vision tower
    stays whole. `last_mlp=False` drops the last layer's MLP too, for hooks before it: the stream is then meaningless
    from that MLP on. Weights need no gradient and the forward keeps no cache. With `tp_mesh`, of one axis, its ranks
    hold a part of the weights each and must call every forward together; the activations are whole on each of them.
    `quantisation` is a scheme of `shared.lm.quantised`.

    Raises GranaryError for a model that can't be had, has fewer layers, or whose files lack some of the weights.
    """
    config = copy.deepcopy(load_trunk_config(path, revision))
    decoder = config.get_text_config(decoder=True)
    total = decoder.num_hidden_layers
    if num_layers is not None:
        if not 1 <= num_layers <= total:
            raise GranaryError(f"{num_layers} layers asked of model {path}, which has {total}")
        truncate_config(decoder, num_layers)
    extra: dict[str, Any] = {}
    if quantisation is not None:
        if tp_mesh is not None:
            raise GranaryError("model.quantisation does not go with tensor_parallel: use replicas, or no quantisation")
        extra = {"quantization_config": quantisation_config(quantisation)}
        if torch.device(device).type != "cpu":
            extra["device_map"] = {"": device}  # quantised weights are made where they stay; needs accelerate
    model = load_part(AutoModel, path, config, dtype, revision, attn_implementation, tp_mesh, extra)
    if len(decoder_blocks(model)) != decoder.num_hidden_layers:
        raise GranaryError(
            f"model {path} ({config.model_type}) cannot be cut off behind layer {decoder.num_hidden_layers - 1}: its"
            " configuration does not say how many layers to make"
        )
    norm = final_norm(model)
    if norm is not None:
        setattr(*norm, nn.Identity())
    family = family_of(decoder)
    if not last_mlp and family is not None:
        decoder_blocks(model)[-1].set_submodule(family.mlp, nn.Identity())
    return model if quantisation is not None else _move(model, device)


def load_causal_lm(
    path: str,
    dtype: torch.dtype | str = "float32",
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The whole model with its LM head, in evaluation mode, weights without gradient; raises as `load_trunk`."""
    config = copy.deepcopy(load_config(path, revision))
    return _move(load_part(AutoModelForCausalLM, path, config, dtype, revision, attn_implementation), device)


def truncate_config(config: PretrainedConfig, num_layers: int) -> None:
    """Make `config` describe the first `num_layers` layers, its per-layer lists included.

    A list that the configuration computes from what else it says (hybrids such as Jamba) follows by itself.
    """
    total = config.num_hidden_layers
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        listed = getattr(config, name, None)
        if isinstance(listed, list) and len(listed) == total:
            with suppress(AttributeError):  # a property
                setattr(config, name, listed[:num_layers])
    config.num_hidden_layers = num_layers


def load_part(
    auto_class: Any,
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    revision: str | None,
    attn_implementation: str,
    tp_mesh: DeviceMesh | None = None,
    extra: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load as much of a model as `config` describes, on the CPU, as `auto_class` makes it; raises as `load_trunk`."""
    extra = dict(extra or {})
    if attn_implementation == "sdpa":
        # Plain sdpa silently leaves out Gemma 2's softcapping of the attention scores and gpt-oss's sinks; ours is sdpa
        # with documents, under a name for which transformers does not ask whether the model can do without them.
        softcapped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        supported = auto_class._model_mapping[type(config)]._supports_sdpa
        attn_implementation = DOCUMENT_SDPA if supported and not softcapped else "eager"
    if tp_mesh is not None and tp_mesh.size() > 1:
        check_tensor_parallel(config, tp_mesh.size())
        auto_class = sharded_class(auto_class._model_mapping[type(config)], tp_mesh)
        extra["distributed_config"] = tensor_parallel_config(tp_mesh)
    config.use_cache = config.get_text_config().use_cache = False
    with quiet_transformers():
        try:
            model, report = auto_class.from_pretrained(
                resolve_model(path, revision),
                config=config,
                dtype=DTYPES[dtype] if isinstance(dtype, str) else dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
        except Exception as error:  # of several libraries, from a config.json that may hold anything
            if not isinstance(error, KeyError) or error.args != (DOCUMENT_SDPA,):
                raise GranaryError(f"model {path} can't be loaded: {told_of(error)}") from error
            # The family (Falcon) has attention classes of its own, whose sdpa is not its eager attention with ALiBi.
            return load_part(auto_class, path, config, dtype, revision, "eager", tp_mesh, extra)
    missing = sorted(report["missing_keys"])
    if missing:
        raise GranaryError(f"model {path}: its files lack {len(missing)} of the weights, {missing[0]} among them")
    model.requires_grad_(False)
    rotate_by_document(model)
    return model.eval()


def _move(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    nn.Module.to(model, device)  # in place; PreTrainedModel.to is the same, behind a wrapper without types
    return model
