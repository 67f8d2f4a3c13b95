"""One run per output folder: two at once would tear each other's checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.basics.errors import GranaryError
from shared.basics.files import lock_folder
from shared.parallel import World


@contextmanager
def only_run_in(folder: Path, world: World) -> Iterator[None]:
    """Hold the folder while training; the kernel lets go of it however the process ends.

    Raises GranaryError on the main rank while another process holds it, such as the rest of a run whose starter was
    killed, or where there can be no such folder. A file system without locks is taken as it is.
    """
    if not world.is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_folder(folder)
    except OSError as error:
        raise GranaryError(f"no folder {folder}: {error.strerror}; set out_dir") from error
    if held is None:
        raise GranaryError(f"another run is training into {folder}: wait for it, end it, or give sae_name=...")
    try:
        yield
    finally:
        os.close(held)
