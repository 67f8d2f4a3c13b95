"""Reading from a repository of the Hugging Face hub: ``hf://datasets/owner/name[@revision][/folder]``.

All is read at one commit, the newest of the revision when the first file is asked for. Nothing is downloaded but the
ranges that are asked for, and nothing is written: ``granary push`` publishes a finished folder in one commit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NoReturn

from shared.basics.errors import GranaryError, told_of
from shared.store.buffers import Buffer

KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}
READ_SECONDS = 60
PART_BYTES = 256 << 10


class HubClient:
    """`remote.Client` over a repository; a token is that of ``hf auth login`` or HF_TOKEN."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = self.url.partition("://")[2].split("/")
        self.repo_type = KINDS.get(parts[0], "model")
        owner, name, *inside = [*(parts[1:] if parts[0] in KINDS else parts), "", ""]
        name, _, self.revision = name.partition("@")
        if not (owner and name):
            raise GranaryError(f"{url} names no repository: write hf://datasets/owner/name")
        self.repo_id, self.folder = f"{owner}/{name}", "/".join(filter(None, inside))

    @cached_property
    def commit(self) -> str:
        """The commit that everything is read at."""
        from huggingface_hub import HfApi

        with self._translated():
            found = HfApi().repo_info(self.repo_id, revision=self.revision or None, repo_type=self.repo_type)
        return str(found.sha)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the repository, by its path there; asked for once, a commit never changes."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self._translated():
            entries = HfApi().list_repo_tree(
                self.repo_id, recursive=True, revision=self.commit, repo_type=self.repo_type
            )
            return {entry.path: int(entry.size) for entry in entries if isinstance(entry, RepoFile)}

    def put(self, key: str, data: bytearray, *, replace: bool) -> NoReturn:
        self._refuse()

    def remove(self, key: str) -> NoReturn:
        self._refuse()

    def fetch(self, key: str, start: int, end: int | None) -> Iterator[Buffer]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        size = self.head(key)
        if start >= size or (end is not None and end > size):
            if start == 0 and end is None:  # an empty file
                return
            raise EOFError(key)
        headers = build_hf_headers()
        if (start, end) != (0, None):
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        headers["Accept-Encoding"] = "identity"  # a range is one of the file's own bytes
        url = hf_hub_url(self.repo_id, self._path(key), repo_type=self.repo_type, revision=self.commit)
        wanted = (size if end is None else end) - start
        with self._translated(), get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as answer:
            hf_raise_for_status(answer)
            for part in answer.iter_bytes(PART_BYTES):
                wanted -= len(part)
                if wanted < 0:  # a server that takes no ranges sends the whole
                    raise GranaryError(f"{self.url}/{key}: the server sent more than was asked for")
                yield part

    def head(self, key: str) -> int:
        try:
            return self.sizes[self._path(key)]
        except KeyError:
            raise FileNotFoundError(key) from None

    def find(self, prefix: str) -> dict[str, int]:
        start = f"{self._path(prefix)}/".lstrip("/")
        skipped = len(f"{self.folder}/".lstrip("/"))
        return {path[skipped:]: size for path, size in self.sizes.items() if path.startswith(start)}

    def _path(self, key: str) -> str:
        return "/".join(filter(None, (self.folder, key)))

    def _refuse(self) -> NoReturn:
        raise GranaryError(f"{self.url} is only read: granary push publishes a finished folder on the hub")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What will not pass by trying again, in one line."""
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise GranaryError(f"{self.url} cannot be read: {told_of(error)}") from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 500)
            if status == 416:
                raise EOFError(self.url) from error
            if status >= 500 or status in (408, 429):
                raise
            raise GranaryError(
                f"{self.url} cannot be read: there is no such repository, revision or file, or it is not yours to see "
                f"(hf auth login): {told_of(error)}"
            ) from None
        except errors.HFValidationError as error:
            raise GranaryError(f"{self.url} names no repository: {told_of(error)}") from None
