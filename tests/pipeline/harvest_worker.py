"""One of four ranks of test_harvest_ranks, or of two of test_harvest_images_ranks:
sharded trunks against whole ones, then whole harvests.

Usage: harvest_worker.py FOLDER JOBS, as torchrun starts it. FOLDER/<family> is a model with 4 key/value heads; JOBS is
a JSON list of command lines of stage_harvest. Rank 0 prints ``family dtype tp worst-relative-difference
share-of-weights``.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shared.launch.overrides import expand_shorthands
from shared.lm import capture, load_trunk, packed_inputs
from shared.lm.hookpoint import hook_points
from stage_harvest.config import register
from stage_harvest.harvest import harvest
from tests.families import sites_of

LAYERS = 2


def share_of_weights(trunk: nn.Module, whole: nn.Module) -> float:
    """The decoder layers' weights on this rank, as a share of all."""
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trunk.layers.parameters())
    return local / sum(p.numel() for p in whole.layers.parameters())


def compare(folder: Path, tp: int) -> None:
    """Every hook of every family in `folder`, in replicas of `tp` ranks that work on different tokens."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(dist.get_rank() // tp)
    tokens_BT = torch.randint(3, 50, (2, 12), generator=generator)
    segments_BT = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    for path in sorted(folder.iterdir()):
        hooks = hook_points("all", sites_of(path.name), LAYERS)
        for dtype in ("float32", "bfloat16"):
            whole = load_trunk(str(path), dtype, num_layers=LAYERS)
            trunk = load_trunk(str(path), dtype, num_layers=LAYERS, tp_mesh=mesh["tp"])
            with torch.no_grad(), capture(whole, hooks) as wanted, capture(trunk, hooks) as got:
                for model in (whole, trunk):
                    model(**packed_inputs(model, tokens_BT, segments_BT, isolated=True))
            errors = [((got[h] - wanted[h]).float().norm() / wanted[h].float().norm()).item() for h in hooks]
            worst = torch.tensor(max(errors))
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                print(path.name, dtype, tp, worst.item(), share_of_weights(trunk, whole), flush=True)  # noqa: T201


def main() -> None:
    dist.init_process_group("gloo")
    for tp in (2, 4):
        if tp <= dist.get_world_size():
            compare(Path(sys.argv[1]), tp)
    register()
    with initialize_config_module("conf", version_base="1.3"):
        for overrides in json.loads(sys.argv[2]):
            harvest(OmegaConf.to_object(compose("harvest", overrides=expand_shorthands(overrides))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
