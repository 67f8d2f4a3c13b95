"""Memory of a frozen base model on a rank, from its ``config.json`` alone: no weight is read or made.

The model is built on the meta device, which has shapes and no numbers, cut off behind a layer as a harvest cuts it, its
tower of images kept. Weights that transformers' tensor-parallel plan splits count by the part of a rank.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from shared.basics.errors import GranaryError, told_of
from shared.lm.load import DTYPES, truncate_config
from shared.lm.places import final_norm, text_stack
from shared.lm.tensor_parallel import check_tensor_parallel

# What each style of a plan splits of a linear module or an embedding: its bias too, or its weight alone.
SPLIT_WITH_BIAS = ("colwise", "colwise_gather_output", "packed_colwise")
SPLIT_WEIGHT = ("rowwise", "packed_rowwise", "embedding_rowwise")


@dataclass(frozen=True)
class BaseMemory:
    """Bytes of weights on each rank."""

    name: str
    ranks: int
    """That share the weights which are split."""
    split: int
    """The rank's parts of those."""
    whole: int
    """Weights of the text stack that every rank holds: norms, and the embedding where the plan does not split it."""
    tower: int
    """What lies beside the text stack, whole on every rank."""
    layers: int
    """Decoder layers that are kept."""
    of_layers: int

    @property
    def blocks(self) -> dict[str, int]:
        """What a rank holds, by name."""
        return {
            "frozen base: parts of split weights": self.split,
            "frozen base: norms and what else is not split, whole": self.whole,
            "frozen base: beside its text stack, whole": self.tower,
        }

    @property
    def total(self) -> int:
        return self.split + self.whole + self.tower

    def __str__(self) -> str:
        return f"{self.name}, {self.layers} of {self.of_layers} layers, split over {self.ranks} ranks"


def base_memory(
    path: str, *, ranks: int, tensor_parallel: int | None = None, layer: int | None = None, dtype: str = "bfloat16"
) -> BaseMemory:
    """Memory of the model whose ``config.json`` is at `path` (a folder, the file, or a hub id), in `dtype`.

    `tensor_parallel` of the `ranks` share it, all where it is None. It is cut behind decoder layer `layer`, counted
    from 0; None keeps it whole, but for the head. Raises GranaryError for a model that can't be had, cut or split so.
    """
    tensor_parallel = tensor_parallel or ranks
    if ranks % tensor_parallel:
        raise GranaryError(f"base_tensor_parallel={tensor_parallel} does not divide the {ranks} ranks")
    if dtype not in DTYPES:
        raise GranaryError(f"base_dtype={dtype}: choose from {', '.join(DTYPES)}")
    try:
        config = copy.deepcopy(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # of several libraries, from a file that may hold anything
        raise GranaryError(f"base={path}: no config.json that transformers can read: {told_of(error)}") from error
    decoder = config.get_text_config(decoder=True)
    total = decoder.num_hidden_layers
    if layer is not None:
        if not 0 <= layer < total:
            raise GranaryError(f"base_layer={layer}: {path} has {total} layers, 0 to {total - 1}")
        truncate_config(decoder, layer + 1)
    check_tensor_parallel(decoder, tensor_parallel)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False, dtype=DTYPES[dtype])
    text = text_stack(model)
    norm = final_norm(model)
    dropped = {id(weight) for weight in getattr(*norm).parameters()} if norm is not None else set()
    plan = _plan(decoder) if tensor_parallel > 1 else {}
    split = whole = 0
    inside = set()
    for name, weight in text.named_parameters():
        inside.add(id(weight))
        size = weight.numel() * weight.element_size()
        if id(weight) in dropped:
            continue
        if _is_split(plan, *name.rpartition(".")[::2]):
            split += size // tensor_parallel
        else:
            whole += size
    outside = [weight for weight in model.parameters() if id(weight) not in inside]
    tower = sum(weight.numel() * weight.element_size() for weight in outside)
    return BaseMemory(path, tensor_parallel, split, whole, tower, decoder.num_hidden_layers, total)


def _plan(config: PretrainedConfig) -> dict[str, str]:
    return dict(config.base_model_tp_plan or {})


def _is_split(plan: Mapping[str, str], module: str, weight: str) -> bool:
    """Whether a rank holds a part of this weight; what a plan says in other words than these counts as whole."""
    style = next((plan[one] for one in plan if re.fullmatch(re.escape(one).replace(r"\*", "[0-9]+"), module)), None)
    return style in SPLIT_WITH_BIAS or (style in SPLIT_WEIGHT and weight == "weight")
