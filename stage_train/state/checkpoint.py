"""Training state on disk: tensors as safetensors, the rest as JSON; atomic, in the background.

    checkpoints/step-00001000/      one folder per kept step
        tensors-*.safetensors       readable under any layout and number of processes; see `tensor_files`
        training.json               all that is not a tensor
        digests.json                what the files and tensors are, so that damage is found
    checkpoints/latest              the name of the newest complete folder

A folder is written under another name, flushed to disk, renamed, and only then pointed to: whatever is killed when,
``latest`` names a folder that loads. A run that is to be discarded (``checkpoint.resume=never``) is moved to
``discarded/`` beside the folder, and removed when the first checkpoint of its successor is on disk.
"""

import json
import logging
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError
from shared.basics.files import sync_folder, write_text
from shared.basics.run_folder import RunFolder
from shared.parallel import World, barrier, broadcast_object
from stage_train.state.integrity import PICKLED, STATE, fault_of
from stage_train.state.staging import HostCopies
from stage_train.state.tensor_files import TensorWriter, expect_one_process, load_tensors, reason

log = logging.getLogger(__name__)

POINTER = "latest"
PARTIAL = ".partial"
STEP = re.compile(r"step-\d{8,}")
MOST = 2**48
# What `training.json` must hold, and what each store in it; the rest is looked at where it is used.
KEYS: dict[str, Any] = {
    "step": int,
    "tokens": int,
    "identity": dict[str, Any],
    "stores": list[dict[str, Any]],
    "stream.epoch": int,
    "stream.batch": int,
    "stream.order": dict[str, Any],
    "stream.tokens": int,
    "sae": dict[str, Any],
    "provenance": dict[str, Any],
    "decays_from": int | None,
    "guard": dict[str, Any] | None,
}
STORE_KEYS: dict[str, Any] = {"weight": float, "shards": list[int], "digest": str}
OPTIONAL: dict[str, Any] = {"decays_from": None, "guard": None}


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int, world: World) -> None:
        """Raises GranaryError when `keep` is below 1."""
        if keep < 1:
            raise GranaryError(f"checkpoint.keep={keep}: at least one checkpoint must be kept")
        self.folder, self.keep, self.world = folder, keep, world
        # A group of its own: the writing thread's collectives must not mix with the training thread's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="granary-checkpoint")
        self._pending: Future[None] | None = None
        self._copies = HostCopies()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank; None without one."""
        return broadcast_object(newest_checkpoint(self.folder) if self.world.is_main else None)

    def latest_intact(self, up_to: int | None = None) -> Path | None:
        """The newest checkpoint (of step `up_to` at most) that is as it was written, likewise.

        Raises GranaryError when all are damaged.
        """
        found: tuple[Path | None, str | None] = (None, None)
        if self.world.is_main:
            try:
                found = intact_checkpoint(self.folder, up_to), None
            except GranaryError as error:
                found = None, str(error)
        path, error_line = broadcast_object(found)
        if error_line is not None:
            raise GranaryError(error_line)
        return path

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place, on all ranks together. Raises GranaryError when the checkpoint lacks them."""
        load_tensors(path, tensors, self._group)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the state now and write it in the background; waits first for the save before this one."""
        self.wait()
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.world.is_main:
            for leftover in (final, *self.folder.glob(f"*{PARTIAL}")):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            write_text(partial / STATE, json.dumps(state, indent=1))
        barrier()
        alone = self._group is None
        if alone:
            expect_one_process()
        future = async_save(
            tensors, storage_writer=TensorWriter(partial, self._copies), process_group=self._group, no_dist=alone
        )
        if isinstance(future, AsyncSaveResponse):
            future = future.upload_completion
        self._pending = self._publisher.submit(self._publish, future, partial, final)

    def wait(self) -> None:
        """Wait until the last save is whole on disk and pointed to. Raises GranaryError when the disk is full."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            why = reason(error)
            if self.world.is_main:  # what is cut off would take the room of the next one
                for leftover in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise GranaryError(f"a checkpoint in {self.folder} could not be written ({why}): is there room?") from error
        barrier()

    def set_aside(self, *beside: str) -> None:
        """Move the checkpoints, and the files named `beside` the folder, into ``discarded``.

        They are removed when the first checkpoint of the run that replaces theirs is on disk.
        """
        if self.world.is_main and newest_checkpoint(self.folder) is not None:
            shutil.rmtree(self.discarded, ignore_errors=True)
            self.discarded.mkdir()
            for name in (*beside, self.folder.name):  # the checkpoints last: until then they are the run's
                if (self.folder.parent / name).exists():
                    (self.folder.parent / name).rename(self.discarded / name)
            sync_folder(self.folder.parent)
        barrier()

    @property
    def discarded(self) -> Path:
        """Where an earlier run lies until this one has a checkpoint."""
        return RunFolder(self.folder.parent).discarded

    def _publish(self, written: "Future[Any]", partial: Path, final: Path) -> None:
        written.result()
        if not self.world.is_main:
            return
        sync_folder(partial)
        partial.rename(final)
        sync_folder(self.folder)
        write_text(self.folder / POINTER, final.name)
        self.prune(final)

    def prune(self, newest: Path) -> None:
        """Remove what `newest`, which is pointed to, makes superfluous: on the main rank, when nothing is pending."""
        steps = sorted(path for path in self.folder.glob("step-*") if PARTIAL not in path.name)
        kept = [path for path in steps if path <= newest][-self.keep :]
        for other in steps:  # a later one is damaged, or of a run that went on from before it
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(self.discarded, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return None
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    if STEP.fullmatch(name):
        return folder / name
    steps = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    log.warning("%s names no checkpoint: using the newest", pointer)
    return max(steps, default=None)


def intact_checkpoint(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint of a folder, of step `up_to` at most, that is as it was written; None where there is none.

    Damaged ones are named and passed over. Raises GranaryError when all there are, are damaged.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    older = sorted((path for path in folder.glob("step-*") if path.name < newest.name), reverse=True)
    paths = [newest, *(path for path in older if STEP.fullmatch(path.name))]
    if up_to is not None:
        paths = [path for path in paths if path.name <= f"step-{up_to:08d}"]
        if not paths:
            return None
    faults: list[tuple[Path, str]] = []
    for path in paths:
        fault = fault_of(path)
        if fault is None:
            for damaged in faults:
                log.warning("checkpoint %s is damaged (%s): using %s", *damaged, path)
            return path
        faults.append((path, fault))
    if (paths[0] / PICKLED).exists():
        raise GranaryError(
            f"checkpoint {paths[0]} is of an older layout whose index is a pickle: it is not read, as it could run "
            "code; finish it with the version that began it, or begin anew with checkpoint.resume=never"
        )
    raise GranaryError(
        f"checkpoint {paths[0]} is damaged ({faults[0][1]}), and no older one is intact: put it back from a copy, or "
        "give checkpoint.resume=never to begin anew (checkpoint.keep=2 keeps an older one)"
    )


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. Raises GranaryError when it cannot be read."""
    try:
        state = read_json(path / STATE)
        for keys, hint in KEYS.items():
            typed_at({**OPTIONAL, **state}, keys, hint, STATE)
        for one in state["stores"]:
            for name, hint in STORE_KEYS.items():
                typed_at(one, name, hint, STATE)
        if not 0 <= state["step"] <= MOST or min(state["stream"]["epoch"], state["stream"]["batch"]) < 0:
            raise GranaryError(f"{STATE} is of step {state['step']}")
        return state
    except GranaryError as error:
        raise GranaryError(
            f"checkpoint {path} cannot be read ({error}): put it back from a copy, or begin anew with "
            "checkpoint.resume=never"
        ) from error
