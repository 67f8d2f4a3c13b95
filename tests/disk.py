"""A disk that fails from its n-th write on, under commands that run in earnest: ``tests/disk.c``, preloaded."""

import errno
import gzip
import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from safetensors import safe_open

from tests.cli import REPOSITORY, ForkServer, Result

FULL, READ_ONLY, BROKEN = errno.ENOSPC, errno.EROFS, errno.EIO
# Parts of the paths of files that are written alike.
ALIKE = "plots|static|column|table|examples|active|windows|tokens|logits|together|neighbours|silent"
MANY = re.compile(rf"({ALIKE})/[^/]+|\d+|evaluation-\w+")
LEFTOVERS = ("*.tmp", "*.partial", ".evaluation-*", ".*staging*", "discarded")


def failing_disk_library(folder: Path) -> Path | None:
    """The shared object, compiled into `folder`; None where there is no C compiler."""
    if shutil.which("cc") is None:
        return None
    made = folder / "disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, REPOSITORY / "tests/disk.c", "-ldl"], check=True)
    return made


@dataclass(frozen=True)
class Call:
    """One that changes the disk: ``write .../eval.json``."""

    number: int
    what: str
    path: str


class FailingDisk:
    """Runs one command again and again, with its folder on a disk that fails."""

    def __init__(self, server: ForkServer, folder: Path, module: str, *arguments: str) -> None:
        """`folder` is where the command writes: all that is under it fails."""
        self.server, self.folder, self.command = server, folder, (module, *arguments)
        self._log = folder.with_name(f"{folder.name}.calls")

    def run(self, fail: int = 0, error: int = FULL) -> Result:
        """Run the command; from call number `fail` on, if there is one, every call fails."""
        self._log.unlink(missing_ok=True)
        variables = {
            "DISK_FOLDER": str(self.folder),
            "DISK_FAIL": str(fail),
            "DISK_ERROR": str(error),
            "DISK_LOG": str(self._log),
        }
        return self.server.start(*self.command, variables=variables).finish()

    def calls(self) -> list[Call]:
        """Those of the last run."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        parts = [line.split(" ", 2) for line in lines]
        return [Call(int(number), what, path) for number, what, path in parts]

    def distinct_calls(self) -> list[Call]:
        """Those of the last run, but of calls alike (another step, another plot) only the first and the last."""
        found: dict[tuple[str, str], list[Call]] = {}
        for call in self.calls():
            found.setdefault((call.what, MANY.sub("", call.path)), []).append(call)
        return sorted({call for alike in found.values() for call in (alike[0], alike[-1])}, key=lambda one: one.number)


def spread(calls: Sequence[Call], count: int) -> list[Call]:
    """`count` of them, the first and the last among them."""
    return [calls[round(i * (len(calls) - 1) / (count - 1))] for i in range(count)]


def check_failure(result: Result) -> None:
    """One line, the right status, no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.code == 2, (result.code, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    assert [line for line in lines if line.startswith("error")] == lines[-1:], result.stderr


def is_leftover(name: str) -> bool:
    """Whether only a process that is at work, or was killed, calls something so."""
    return any(fnmatch(name, pattern) for pattern in LEFTOVERS)


def leftovers(folder: Path) -> list[Path]:
    """What only a process that is at work, or was killed, has there."""
    return sorted(path for pattern in LEFTOVERS for path in folder.rglob(pattern))


def half_files(folder: Path) -> Iterator[str]:
    """Files under their final names that are not whole, by what their kind ends with."""
    for path in filter(Path.is_file, folder.rglob("*")):
        whole = WHOLE.get(path.suffix)
        # These are Hydra's own notes of the command line; who reads them takes a torn one as none.
        is_hydras = ".hydra" in path.parts or path.name == "multirun.yaml"
        if whole is None or is_hydras or any(is_leftover(part) for part in path.parts):
            continue
        try:
            if not whole(path):
                yield f"{path} is not whole"
        except Exception as error:
            yield f"{path} is not whole: {error!r}"


def _json(path: Path) -> bool:
    json.loads(path.read_bytes())
    return True


def _safetensors(path: Path) -> bool:
    with safe_open(path, "numpy") as file:
        return all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118 (not a dict)


def _sqlite(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


WHOLE: dict[str, Callable[[Path], bool]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".png": lambda path: path.read_bytes().endswith(b"IEND\xaeB`\x82"),
    ".html": lambda path: path.read_bytes().rstrip().endswith(b"</html>"),
    ".yaml": lambda path: path.read_bytes().endswith(b"\n"),
    ".sqlite": lambda path: path.stat().st_size == 0 or _sqlite(path),  # an empty one counts as none
    ".parquet": lambda path: path.read_bytes()[-4:] == b"PAR1",
    ".gz": lambda path: gzip.decompress(path.read_bytes()) is not None,
    ".jsonl": lambda path: all(json.loads(line) is not None for line in path.read_bytes().splitlines()),
    ".pt": lambda path: b"PK\x05\x06" in path.read_bytes()[-100:],
}
