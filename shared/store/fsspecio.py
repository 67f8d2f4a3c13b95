"""Storage at any URL that fsspec knows: memory, s3, gs, az, http ..."""

from collections.abc import Iterable, Sequence
from typing import Any

import fsspec

from shared.errors import GranaryError
from shared.store.buffers import Buffer, byte_view
from shared.store.objectio import explained


class FsspecIO:
    """Objects below one fsspec URL. A single `pipe_file` is atomic on every object store."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.fs: Any
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra = " (pip install 'granary[s3]')" if url.startswith("s3://") else ""
            raise GranaryError(f"{url} needs a package that is not installed{extra}: {error}") from error
        except ValueError as error:
            raise GranaryError(f"{url} is not a URL that can be opened: {error}") from error

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        if not replace and self.size(key) is not None:
            return False
        data = b"".join(byte_view(part) for part in parts)
        try:
            with explained(self.url, key, "write"):
                self.fs.pipe_file(self._path(key), data, mode="overwrite" if replace else "create")
        except GranaryError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def get(self, key: str) -> bytes:
        with explained(self.url, key, "read"):
            return bytes(self.fs.cat_file(self._path(key)))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        total = sum(len(buffer) for buffer in buffers)
        with explained(self.url, key, "read"):
            data = memoryview(self.fs.cat_file(self._path(key), start=offset, end=offset + total))
        if len(data) != total:
            raise GranaryError(f"{key} is shorter than its commit record says: it ends at byte {offset + len(data)}")
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)

    def size(self, key: str) -> int | None:
        try:
            return int(self.fs.info(self._path(key), refresh=True)["size"])
        except FileNotFoundError:
            return None

    def listing(self, prefix: str = "") -> dict[str, int]:
        base = f"{self.root}/{prefix}".rstrip("/")
        try:
            found = self.fs.find(base, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        start = len(self.root.strip("/")) + 1
        return {path.strip("/")[start:]: int(info["size"]) for path, info in sorted(found.items())}

    def delete(self, key: str) -> None:
        with explained(self.url, key, "delete"):
            try:
                self.fs.rm_file(self._path(key))
            except FileNotFoundError:
                return

    def leftovers(self) -> list[str]:
        return []  # an object store shows whole objects only

    def free_bytes(self) -> int | None:
        return None

    def claim(self, *, exclusive: bool) -> bool:
        return True  # object stores have no locks; puts that never replace are what protects there

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"
