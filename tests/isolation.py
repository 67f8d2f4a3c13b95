"""A test finds nothing of the user's around it and leaves nothing in the checkout.

`begin` cleans the environment of the whole session, before any library reads it. `alone` then gives each test a home,
caches, a temporary folder and a working folder of its own, all empty, and afterwards undoes what the test did to the
environment and the working folder. `listing`, taken before and after a session, shows what was left in the checkout.
"""

import fnmatch
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# All that passes from the user's environment: how to find programs, libraries, the network and temporary space, what
# the processor and the GPU may be used for, and what the tests themselves are told. A variable that is not listed
# (GRANARY_*, HF_*, WANDB_*, SLURM_*, RANK, COLUMNS, PYTHONWARNINGS, GIT_DIR, ...) would make results the user's own.
KEPT = (
    "PATH", "LD_*", "DYLD_*", "TMPDIR", "LANG", "LC_*", "USER", "LOGNAME", "SHELL", "VIRTUAL_ENV", "CI", "CC", "CXX",
    "*_proxy", "*_PROXY", "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NIX_*",
    "OMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "CUDA_*", "NVIDIA_*", "ROCR_*", "HIP_*",
    "ATEN_CPU_CAPABILITY", "ONEDNN_*", "DNNL_*", "GRANARY_BFLOAT16",
    "PYTEST_*", "COVERAGE_*", "COV_CORE_*", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
    "GRANARY_REALDATA", "SERVING_PYTHON", "CHROMIUM", "S3_DIR", "S3_PORT", "SLURM_CONF",
)  # fmt: skip
# What pytest and its plugins keep in the checkout, and tools that someone may start meanwhile.
TOOLS_LEAVE = {".pytest_cache", ".hypothesis", ".coverage", "__pycache__", ".mypy_cache", ".ruff_cache"}
_FOLDER = Path(tempfile.gettempdir())
_numbers = itertools.count()


def places(folder: Path) -> dict[str, str]:
    """The variables by which programs find the user's folders, set to new folders in `folder`."""
    home, temporary = folder / "home", folder / "tmp"
    home.mkdir(parents=True)
    temporary.mkdir()
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_DATA_HOME": str(home / ".local/share"),
        "XDG_STATE_HOME": str(home / ".local/state"),
        "TMPDIR": str(temporary),
    }


def begin() -> None:
    """Leave only `KEPT` in the environment; the packages and ``tests`` are found from every working folder.

    Must run before the libraries that read their variables on import (huggingface_hub, transformers, triton).
    """
    global _FOLDER
    _FOLDER = Path(tempfile.mkdtemp(prefix="granary-tests-"))
    for name in [name for name in os.environ if not any(fnmatch.fnmatchcase(name, kept) for kept in KEPT)]:
        del os.environ[name]
    places_of_session = places(_FOLDER / "session")
    del places_of_session["TMPDIR"]  # the folder of pytest's tmp_path stays where the user wants it
    os.environ |= places_of_session
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("PYTEST_SHARED", str(_FOLDER / "session" / "shared"))  # by a session's first process
    shared_folder().mkdir(parents=True, exist_ok=True)
    # It holds a list of the machine's fonts, which takes a second to make: once per session, not per process.
    os.environ["MPLCONFIGDIR"] = str(_FOLDER / "session" / "matplotlib")

    # Twenty thousand waits for the disk, of 2 ms each: no test loses power, and what a killed process wrote stays.
    os.fsync = os.fdatasync = lambda fd: None


def shared_folder() -> Path:
    """One folder for all processes of a session of tests."""
    return Path(os.environ["PYTEST_SHARED"])


def end() -> None:
    """Remove what `begin` made."""
    shutil.rmtree(_FOLDER, ignore_errors=True)


@contextmanager
def _undone() -> Iterator[None]:
    environment, folder = dict(os.environ), Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def between_tests() -> Iterator[None]:
    """An empty working folder for the fixtures that tests share."""
    (_FOLDER / "session" / "work").mkdir()
    with _undone():
        os.chdir(_FOLDER / "session" / "work")
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Empty folders for one test, and its changes to the environment and the working folder undone."""
    folder = _FOLDER / str(next(_numbers))
    with _undone():
        os.environ |= places(folder)
        (folder / "work").mkdir()
        os.chdir(folder / "work")
        yield
    shutil.rmtree(folder, ignore_errors=True)


def listing() -> set[str]:
    """Names at the top of the checkout and in the folders that runs are written to by default."""
    folders = [REPOSITORY, *(REPOSITORY / name for name in ("runs", "outputs", "multirun"))]
    names = {str(path.relative_to(REPOSITORY)) for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return names - TOOLS_LEAVE
