"""Storage at any URL that fsspec knows: memory, s3 through s3fs, gs, az ..."""

import errno
from typing import Any

import fsspec

from shared.basics.errors import GranaryError
from shared.store.buffers import Buffer

# s3fs: a whole object in one PUT, and time enough for it. Its own retries are few; `RemoteIO` has the long ones.
# TLS guards the way and commit records the content, so no SHA-256 and no second checksum of every byte.
S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 300,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"payload_signing_enabled": False},
    },
}
S3_SINGLE_PUT = {"chunksize": 5 << 30}


class FsspecClient:
    """`remote.Client` over an fsspec file system."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._is_s3 = url.startswith(("s3://", "s3a://"))
        try:
            self.fs: Any
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **(S3_OPTIONS if self._is_s3 else {}))
        except ImportError as error:
            extra = " (pip install 'granary-sae[s3]')" if self._is_s3 else ""
            raise GranaryError(f"{url} needs a package that is not installed{extra}: {error}") from error
        except ValueError as error:
            raise GranaryError(f"{url} is not a URL that can be opened: {error}") from error

    def put(self, key: str, data: bytearray, *, replace: bool) -> None:
        mode = "overwrite" if replace else "create"
        try:
            self.fs.pipe_file(self._path(key), data, mode=mode, **(S3_SINGLE_PUT if self._is_s3 else {}))
        except OSError as error:
            # s3fs turns the failed precondition into a plain OSError
            if not replace and "PreconditionFailed" in f"{error!r} {error.__cause__!r}":
                raise FileExistsError(key) from error
            raise

    def fetch(self, key: str, start: int, end: int | None) -> list[Buffer]:
        try:
            data: Buffer = self.fs.cat_file(self._path(key), start=start or None, end=end)
        except OSError as error:
            if error.errno == errno.EINVAL:  # s3fs for 416, a range beyond the end
                raise EOFError(key) from error
            raise
        return [data]

    def head(self, key: str) -> int:
        info = self.fs.info(self._path(key), refresh=True)
        if info["type"] == "directory":  # a prefix of other keys
            raise FileNotFoundError(key)
        return int(info["size"])

    def find(self, prefix: str) -> dict[str, int]:
        try:
            found = self.fs.find(f"{self.root}/{prefix}".rstrip("/"), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        start = len(self.root.strip("/")) + 1
        return {path.strip("/")[start:]: int(info["size"]) for path, info in found.items()}

    def remove(self, key: str) -> None:
        self.fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"
