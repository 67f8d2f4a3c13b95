"""Tensor parallelism by transformers' own plans, on one axis of a device mesh.

Each rank of the axis holds its part of every sharded weight, read straight from the file: no rank ever has the whole
model. The residual stream is replicated, so hooks see the same full activation on every rank of the axis.
"""

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import utils
from transformers.distributed.configuration_utils import DistributedConfig

from shared.basics.errors import GranaryError


def check_tensor_parallel(config: PretrainedConfig, size: int) -> None:
    """Raise GranaryError unless the model's text stack has a plan and its heads and MLP divide by `size`.

    A vision tower has no plan: it is whole on every rank.
    """
    if size == 1:
        return
    config = config.get_text_config(decoder=True)
    # A plan that names no layers, by a star, splits the embedding alone.
    if not any("*" in rule for rule in getattr(config, "base_model_tp_plan", None) or ()):
        raise GranaryError(f"transformers has no tensor-parallel plan for {config.model_type}: use tensor_parallel=1")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for count, name in (
        (heads, "key/value heads"),
        (config.num_attention_heads, "attention heads"),
        (config.intermediate_size, "MLP neurons"),
    ):
        if count % size:
            raise GranaryError(f"tensor_parallel={size} does not divide the model's {count} {name}")


@dataclass(frozen=True)
class _Meshes:
    """What newer versions of transformers ask for the mesh of some axes: this one, of tensor parallelism alone."""

    tp_mesh: DeviceMesh

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        return self.tp_mesh


def sharded_class(model_class: type[PreTrainedModel], tp_mesh: DeviceMesh) -> type[PreTrainedModel]:
    """`model_class` whose ``from_pretrained(distributed_config=...)`` shards over `tp_mesh`.

    transformers accepts a mesh of its own making only, with as many ranks as the job has. A mesh with a further axis,
    for replicas, is the same to everything after that check. The class says that it is of the same module: of models
    of another's making transformers leaves out the renaming of what their files hold.
    """

    meshes = _Meshes(tp_mesh) if hasattr(utils, "TransformersDeviceMesh") else tp_mesh

    def prepare_distribute_model(
        cls: type, distributed_config: Any, *, device_mesh: Any = None, device_map: Any = None
    ) -> tuple[Any, None, Any]:
        return distributed_config, None, meshes

    members = {
        "__module__": model_class.__module__,
        "prepare_distribute_model": classmethod(prepare_distribute_model),
    }
    return type(model_class.__name__, (model_class,), members)


def tensor_parallel_config(tp_mesh: DeviceMesh) -> DistributedConfig:
    """transformers' request for the model's own plan over all ranks of `tp_mesh`."""
    return DistributedConfig(tp_size=tp_mesh.size(), tp_plan="auto")
