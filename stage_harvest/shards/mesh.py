"""How ranks divide the work: replicas of the model take shards, the ranks of one replica share its weights."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shared.basics.errors import GranaryError
from shared.parallel import World


@dataclass(frozen=True, slots=True)
class MeshRank:
    """This rank in the mesh dp x tp."""

    replica: int
    num_replicas: int
    part: int
    """Rank within the replica; part 0 keeps the activations and writes them."""
    tp_mesh: DeviceMesh | None
    """The replica's axis of the mesh; None where a replica is one rank."""


def check_mesh(world: World, tensor_parallel: int) -> None:
    """Raise GranaryError unless the ranks divide into replicas of `tensor_parallel` ranks."""
    if tensor_parallel < 1 or world.size % tensor_parallel:
        raise GranaryError(
            f"tensor_parallel={tensor_parallel} does not divide the {world.size} processes of this job:"
            " give nproc or NPROC a multiple of it"
        )


def join_mesh(world: World, tensor_parallel: int) -> MeshRank:
    """This rank's coordinates; every rank must call it, since it makes the communication groups."""
    replicas = world.size // tensor_parallel
    replica, part = divmod(world.rank, tensor_parallel)
    tp_mesh = None
    if tensor_parallel > 1:
        mesh = init_device_mesh(world.device.type, (replicas, tensor_parallel), mesh_dim_names=("dp", "tp"))
        tp_mesh = mesh["tp"]
    return MeshRank(replica, replicas, part, tp_mesh)
