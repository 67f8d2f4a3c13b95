"""Find the storage behind a URL."""

import importlib.util
import os

from shared.basics.display import refuse_password
from shared.store.io.base import ObjectIO
from shared.store.io.fsspec import FsspecClient
from shared.store.io.hub import HubClient
from shared.store.io.local import LocalIO
from shared.store.io.obstore import ObstoreClient
from shared.store.io.remote import RemoteIO


def open_io(url: str | os.PathLike[str] | ObjectIO) -> ObjectIO:
    """Give the storage at `url`: a local path, ``file://``, or any other URL that fsspec knows; storage is itself.

    Raises GranaryError for a URL with a password in it.
    """
    if not isinstance(url, str | os.PathLike):
        return url
    text = os.fspath(url)
    refuse_password(text)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalIO(text)
    if protocol in ("file", "local"):
        return LocalIO(rest)
    if protocol == "hf":
        return RemoteIO(HubClient(text))
    if protocol in ("s3", "s3a") and importlib.util.find_spec("obstore") is not None:
        return RemoteIO(ObstoreClient(text))
    return RemoteIO(FsspecClient(text))
