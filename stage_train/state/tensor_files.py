"""Tensors of a training state by torch.distributed.checkpoint, in safetensors files: reading them back runs no code.

    tensors-00000.safetensors      what rank 0 held: parts of tensors, with their places in the whole in the metadata
    tensors-00000-1.safetensors    the second parts of those of which it held two, and so on

torch's own storage keeps its index as a pickle. Its writer of safetensors makes each file in memory before the disk
sees it; this one hands it one tensor at a time, and notes the digest of each as it does.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shared.basics.errors import GranaryError
from shared.sae.weights_file import header_digest, write_weights
from stage_train.state.integrity import TensorsDigest, write_digests
from stage_train.state.staging import HostCopies

PLACES = "DCP_SHARDING_INFO"
"""Key of a file's metadata under which torch looks for where each part begins in the whole."""


@dataclass(frozen=True)
class _Written:
    """What a rank tells the coordinator of a tensor that it wrote: all there is to say of the file, with each."""

    file: str
    digest: TensorsDigest


class TensorWriter(BlockingAsyncStager, StorageWriter):
    """Writes a file per rank into a folder, and when all have, the digests of the folder's files.

    It copies the state to host memory once, and holds nothing but that copy: torch's own staging copies every DTensor
    twice, and the second copies live until the garbage collector runs.
    """

    def __init__(self, folder: Path, copies: HostCopies) -> None:
        super().__init__()
        self.folder, self.copies = folder, copies

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called by async_save: tensors on the host, which share no memory with `state_dict`."""
        return self.copies.copy(state_dict)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's parts; a rank that holds none writes no file."""
        future: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        for number, items in enumerate(_by_name(plan.items)):
            suffix = f"-{number}" if number else ""
            results += self._write(items, planner, f"tensors-{plan.storage_data:05d}{suffix}.safetensors")
        future.set_result(results)
        return future

    def _write(self, items: Mapping[str, WriteItem], planner: SavePlanner, name: str) -> list[WriteResult]:
        """One file, of one part of each tensor."""
        parts: dict[str, Tensor] = {}
        for fqn, item in items.items():
            part = planner.resolve_data(item)
            assert isinstance(part, Tensor)
            parts[fqn] = part
        places = {
            fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets) if item.tensor_data else []}
            for fqn, item in items.items()
        }
        path = self.folder / name
        with path.open("w+b") as file:
            digests = write_weights(file, parts, parts.__getitem__, lambda _: {PLACES: json.dumps(places)})
            file.flush()
            os.fsync(file.fileno())
            file.seek(0, os.SEEK_END)
            written = _Written(path.name, TensorsDigest(file.tell(), header_digest(file), digests))
        return [WriteResult(item.index, parts[fqn].nbytes, written) for fqn, item in items.items()]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """End the save, on the coordinator, when all ranks have written."""
        files = {one.storage_data.file: one.storage_data.digest for of_rank in results for one in of_rank}
        write_digests(self.folder, files)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks, whose files are named by it."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """It is given a folder when it is made."""
        return False


class TensorReader(HuggingFaceStorageReader):
    """torch's reader, which refuses a checkpoint that lacks parts of a tensor: it would leave them as they are."""

    def read_metadata(self) -> Metadata:
        """Read the headers of all files of the folder. Raises ValueError naming a tensor that is not whole."""
        metadata: Metadata = super().read_metadata()
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if sum(prod(part.sizes) for part in tensor.chunks) != prod(tensor.size):
                raise ValueError(f"{name} is not whole")
        return metadata


def load_tensors(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` in place: on the ranks of `group` together, or without one on this process alone.

    Raises GranaryError when the checkpoint does not hold them.
    """
    if group is None:
        expect_one_process()
    try:
        load(tensors, storage_reader=TensorReader(str(path)), process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise GranaryError(
            f"checkpoint {path} cannot be loaded ({reason(error)}): put it back from a copy, or begin anew with "
            "checkpoint.resume=never"
        ) from error


def expect_one_process() -> None:
    """DCP warns at every call that it runs in one process: true, and meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def reason(error: BaseException) -> str:
    """The first failing rank's own error, without the traceback that DCP puts around it, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{error}".split()) or type(error).__name__


def _by_name(items: Sequence[WriteItem]) -> list[dict[str, WriteItem]]:
    """The first part of every tensor, then the second of those that have several, and so on."""
    found: list[dict[str, WriteItem]] = []
    for item in items:
        rounds = [one for one in found if item.index.fqn not in one]
        if not rounds:
            rounds = [{}]
            found += rounds
        rounds[0][item.index.fqn] = item
    return found
