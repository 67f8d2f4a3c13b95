"""Sites that were added to a store after its harvest: more activations at the very same tokens.

An addition is a store of its own, with a plan, commit records and an end of its own, that shares the arrays' places and
the token objects with the store it is added to. Under ``additions/{name}/`` lie its records, and the documents that the
store has its own of; its activations lie where those of the first harvest would. Nothing that the store holds already
is changed, so whatever was trained from it stays valid. Readers see an addition once it is complete.
"""

from collections.abc import Iterable, Iterator, Sequence

from shared.basics.errors import GranaryError
from shared.store.buffers import Buffer
from shared.store.format import layout
from shared.store.format.layout import StorePlan
from shared.store.io.base import ObjectIO

FOLDER = "additions"
NAME_CHARACTERS = 16
OWN_FOLDERS = ("extents", "manifest", "window")
OWN_DOCUMENTS = frozenset((layout.COMPLETE, "zarr.json", *(f"{name}/zarr.json" for name in layout.TOKEN_ARRAYS)))


def addition_name(plan: StorePlan) -> str:
    """Name of the addition that `plan` makes: the same harvest finds what it began."""
    return plan.hash()[:NAME_CHARACTERS]


class AddedIO:
    """`ObjectIO` over a store's storage, in which one of its additions is a store by itself."""

    def __init__(self, io: ObjectIO, name: str) -> None:
        self.io = io
        self.url = io.url
        self.name = name
        self.parallel_puts = io.parallel_puts

    def real(self, key: str) -> str:
        """The key in the store's storage."""
        is_own = key in OWN_DOCUMENTS or key.split("/", 1)[0] in OWN_FOLDERS
        return f"{FOLDER}/{self.name}/{key}" if is_own else key

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        return self.io.put(self.real(key), parts, replace=replace)

    def get(self, key: str) -> bytes:
        return self.io.get(self.real(key))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        self.io.read_into(self.real(key), offset, buffers)

    def read_checked(self, key: str, offset: int, buffers: Sequence[memoryview]) -> list[int]:
        return self.io.read_checked(self.real(key), offset, buffers)

    def size(self, key: str) -> int | None:
        return self.io.size(self.real(key))

    def listing(self, prefix: str = "") -> dict[str, int]:
        """Below a folder as in any storage. Of the whole: the addition's own records, and what lies in no addition."""
        if prefix:
            return self.view(self.io.listing(self.real(f"{prefix}/").rstrip("/")))
        return self.view(self.io.listing())

    def view(self, sizes: dict[str, int]) -> dict[str, int]:
        """A listing of the store's storage as this one has it."""
        own = f"{FOLDER}/{self.name}/"
        shared = {
            key: size for key, size in sizes.items() if not key.startswith(f"{FOLDER}/") and self.real(key) == key
        }
        return shared | {key.removeprefix(own): size for key, size in sizes.items() if key.startswith(own)}

    def delete(self, key: str) -> None:
        self.io.delete(self.real(key))

    def leftovers(self) -> list[str]:
        return [key for key in self.io.leftovers() if self.real(key) == key]

    def free_bytes(self) -> int | None:
        return self.io.free_bytes()

    def claim(self, *, exclusive: bool) -> bool:
        return self.io.claim(exclusive=exclusive)


def additions(io: ObjectIO, keys: Iterable[str] | None = None) -> Iterator[AddedIO]:
    """Every addition to the store behind `io`, begun or complete, by name; `keys` are a listing of it, where known."""
    found = io.listing(FOLDER) if keys is None else keys
    parts = [key.split("/") for key in found if key.startswith(f"{FOLDER}/")]
    for name in sorted({part[1] for part in parts if len(part) > 2}):
        yield AddedIO(io, name)


def check_addition(url: str, added: StorePlan, name: str, plan: StorePlan) -> None:
    """Raise GranaryError unless the addition called `name`, whose plan is `added`, belongs to the store of `plan`."""
    same = ("num_contexts", "seq_len", "shard_contexts", "dtype")
    if addition_name(added) != name or any(getattr(added, one) != getattr(plan, one) for one in same):
        raise GranaryError(f"{url}/{FOLDER}/{name} is no addition to this store: move it away")
