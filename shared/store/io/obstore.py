"""Storage on S3 through obstore, the fast client: half again the write and a third more read speed than s3fs.

Endpoint, region and credentials come from the environment as obstore reads it: AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or the instance's role.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from shared.basics.errors import GranaryError
from shared.store.buffers import Buffer

PART_BYTES = 256 << 10  # smaller parts cost calls, larger ones are put together in memory first


class ObstoreClient:
    """`remote.Client` over obstore's S3 store."""

    def __init__(self, url: str) -> None:
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.partition("://")[2].partition("/")
        if not bucket:
            raise GranaryError(f"{url} names no bucket: write s3://bucket/folder")
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        options: Any = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=60),
            "timeout": timedelta(minutes=30),  # of a whole request; a stalled one ends by the read time-out
        }
        self._obstore: Any = obstore
        try:
            self._store: Any = S3Store(
                bucket,
                prefix=prefix or None,
                client_options=options,
                retry_config={"max_retries": 0},  # `RemoteIO` tries again, and says so
                unsigned_payload=True,  # TLS guards the way, commit records the content: no SHA-256 of every byte
            )
        except BaseError as error:
            raise GranaryError(f"{url} cannot be opened: {' '.join(str(error).split())}") from error

    def put(self, key: str, data: bytearray, *, replace: bool) -> None:
        with translated():
            mode = "overwrite" if replace else "create"
            self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)

    def fetch(self, key: str, start: int, end: int | None) -> Iterator[Buffer]:
        options = None if end is None else {"range": (start, end)}
        with translated():
            # A stream: the bytes of a range are copied once, to where the caller wants them.
            yield from self._obstore.get(self._store, key, options=options).stream(min_chunk_size=PART_BYTES)

    def head(self, key: str) -> int:
        with translated():
            return int(self._obstore.head(self._store, key)["size"])

    def find(self, prefix: str) -> dict[str, int]:
        with translated():
            chunks = self._obstore.list(self._store, prefix or None)
            return {entry["path"]: int(entry["size"]) for chunk in chunks for entry in chunk}

    def remove(self, key: str) -> None:
        with translated():
            self._obstore.delete(self._store, key)


@contextmanager
def translated() -> Iterator[None]:
    """obstore's exceptions as Python's."""
    from obstore import exceptions

    kinds: dict[type[Exception], Callable[[str], Exception]] = {
        exceptions.NotFoundError: FileNotFoundError,
        exceptions.AlreadyExistsError: FileExistsError,
        exceptions.PreconditionError: FileExistsError,
        exceptions.PermissionDeniedError: PermissionError,
        exceptions.UnauthenticatedError: PermissionError,
    }
    try:
        yield
    except tuple(kinds) as error:
        raise kinds[type(error)](str(error)) from error
    except exceptions.GenericError as error:
        if "InvalidRange" in str(error) or "Range Not Satisfiable" in str(error):  # digits alone may be a time's
            raise EOFError(str(error)) from error
        raise
