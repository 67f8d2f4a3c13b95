"""How an SAE in training is spread over processes.

A layout says which rows of a batch a rank reads, which part of the weights it holds, and how gradients meet. The
trainer is the same under all of them, and so are the weights it arrives at.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from shared.parallel import World, all_reduce_max
from shared.sae import SAE, SAEAdam, SAELosses


class Replicated:
    """Every rank holds the whole SAE and reads its share of each batch (data parallel); also the world of one."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def stream_rank(self) -> int:
        """Which share of the lanes this rank reads."""
        return self.world.rank

    @property
    def stream_world(self) -> int:
        """Into how many shares the lanes are cut."""
        return self.world.size

    def distribute(self, sae: SAE) -> SAE:
        """Make rank 0's weights everyone's: initialisation on different machines may round differently."""
        if self.world.size > 1:
            for tensor in sae.state_dict().values():
                dist.broadcast(tensor, src=0)
        return sae

    def losses(self, sae: SAE, rows_N_D: Tensor, dead_R: Tensor) -> SAELosses:
        """The losses of some of this rank's rows."""
        return sae.losses(rows_N_D, dead_R)

    def reduce_gradients(self, optimiser: SAEAdam) -> Tensor:
        """Sum every gradient over the ranks, once; returns the norm of all of them together."""
        if self.world.size > 1:
            pending = []
            for parameter in optimiser.parameters.values():
                if parameter.grad is None:  # a rank without rows
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
            for work in pending:
                work.wait()
        return optimiser.grad_norm()

    def merge_fired(self, fired_F: Tensor) -> Tensor:
        """The elementwise maximum over the ranks that hold the same latents."""
        return all_reduce_max(fired_F)
