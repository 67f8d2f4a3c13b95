"""The process group torchrun describes, or a world of one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from shared.basics.errors import GranaryError
from shared.launch.orphans import end_with_starter

T = TypeVar("T")

# A rank that died must end the job within a minute, not after torch's default ten.
COLLECTIVE_TIMEOUT = timedelta(seconds=float(os.environ.get("GRANARY_COLLECTIVE_TIMEOUT_S", "600")))


LAST_WORDS_SECONDS = 5
LOST_CONTACT = (
    "another process of this job has ended and has said why, or its machine may be gone;"
    " run the same command again to continue"
)


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes what exists once."""
        return self.rank == 0


def init_world(device: str = "auto", threads: int | None = None) -> World:
    """Join the process group that torchrun's environment names; without one, a world of one.

    `device` is auto, cpu or cuda. Raises GranaryError when CUDA is asked for and absent.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if "RANK" in os.environ:
        end_with_starter()
    if device not in ("auto", "cpu", "cuda"):
        raise GranaryError(f"device.name={device!r}: choose from auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise GranaryError("device.name=cuda, but torch sees no CUDA device: use device.name=cpu")
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu" and torch.cuda.is_available():
        torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if torch_device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return World(rank, size, local_rank, torch_device)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over ranks in place and return it; the identity in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over ranks, in place; the identity in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(obj: T) -> T:
    """Rank 0's object on every rank (pickled); the identity in a world of one."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank; returns at once in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says no more than that another rank is gone."""
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


@contextmanager
def telling_lost_contact() -> Iterator[None]:
    """Turn the failure of a collective because another rank has ended into one line, after that rank's own."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not lost_contact(error):
            raise
        time.sleep(LAST_WORDS_SECONDS)  # torchrun, which knows what happened, ends this rank meanwhile
        raise GranaryError(LOST_CONTACT) from error


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
