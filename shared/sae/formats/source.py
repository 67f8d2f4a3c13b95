"""A foreign folder while it is read: each key and tensor of its files is honoured, harmless or refused by name.

What a reader asks for is honoured; what it lists as harmless changes nothing of what the SAE computes; anything else is
refused when the reader is done, since it may change the function. ``ignore`` leaves named ones out, by the decision of
whoever knows them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.basics.documents import read_json
from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_pickled, read_safetensors, read_tensors

LARGEST = 1e15  # of a number, so that what is computed from a few of them fits float32
# What wrappers of a module put before the names of its tensors: torch.compile, DataParallel.
WRAPPERS = ("_orig_mod.", "module.")
UNKNOWN = (
    "which this reader does not know and which may change what the SAE computes: if it does not, leave it out with "
    "`convert --ignore {}`"
)


class Source:
    """A folder, or a file, and what is asked of it."""

    def __init__(
        self,
        folder: Path,
        ignore: Collection[str] = (),
        file: Path | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """`file` is the file of weights, whatever its name; `given` are settings that the files do not say."""
        self.folder = folder
        self.file = file
        self.given = dict(given or {})
        self.ignore = frozenset(ignore)
        self._ignored: set[str] = set()
        self._parts: list[Document | Tensors] = []

    def json(self, name: str, harmless: Collection[str] = ()) -> "Document":
        """A JSON file, with the settings that were given; these alone where it is not there."""
        path = self.folder / name
        content = read_json(path) if path.is_file() or not self.given else {}
        return self.document(merged(content, self.given, path), path, harmless)

    def weights(self, name: str) -> Path:
        """The file of weights, which is called `name` in a folder."""
        return self.file or self.folder / name

    def document(self, content: Mapping[str, Any], where: Path | str, harmless: Collection[str] = ()) -> "Document":
        """What was read from `where`."""
        made = Document(self._left(content), where, harmless)
        self._parts.append(made)
        return made

    def safetensors(self, name: str, harmless: Collection[str] = ()) -> "Tensors":
        """Those of ``<name>.safetensors``, or of the files that its index lists."""
        found = read_tensors(self.folder, name) if self.file is None else read_safetensors(self.file)
        return self.tensors(found, harmless)

    def pickled(self, name: str, harmless: Collection[str] = (), offset: int = 0) -> "Tensors":
        """Those of a file of torch's, which may lie under ``state_dict`` beside settings; these are refused by name."""
        path = self.weights(name)
        found = read_pickled(path, offset)
        if isinstance(found.get("state_dict"), dict):
            self.document(found, path, ("state_dict",))
            found = found["state_dict"]
        named = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        self.document({key: value for key, value in found.items() if key not in named}, path)
        return self.tensors(named, harmless)

    def tensors(self, found: Mapping[str, Tensor], harmless: Collection[str] = ()) -> "Tensors":
        """Those in `found`, float32, under the names that they have in the module itself."""
        named = unwrapped(found)
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named.items()}
        made = Tensors(self._left(floats), self.folder, harmless)
        self._parts.append(made)
        return made

    def close(self) -> None:
        """Raise GranaryError for what was in the files and nobody asked for, and for what `ignore` names in vain."""
        for part in self._parts:
            part.close()
        if vain := sorted(self.ignore - self._ignored):
            raise GranaryError(f"--ignore {vain[0]}: {self.folder} has no such key or tensor")

    def _left(self, content: Mapping[str, Any]) -> dict[str, Any]:
        self._ignored |= self.ignore & content.keys()
        return {name: value for name, value in content.items() if name not in self.ignore}


def unwrapped(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors under the names that they have in the module itself."""
    for wrapper in WRAPPERS * 2:
        if found and all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def merged(content: Mapping[str, Any], given: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A document with what was given beside it; raises GranaryError where it says something else itself."""
    made = dict(content)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(made.get(key, {}), dict):
            made[key] = merged(made.get(key, {}), value, where)
        elif key in made and made[key] != value:
            raise GranaryError(f"--set {key}={value}: {where} has {key}={made[key]!r:.40}")
        else:
            made[key] = value
    return made


class Document:
    """The keys of a file of settings. Every question raises GranaryError for an answer of another type."""

    def __init__(self, content: Mapping[str, Any], where: Path | str, harmless: Collection[str]) -> None:
        self.content, self.where = dict(content), where
        self._known = set(harmless)

    def get(self, name: str) -> Any:
        """The value of a key, None where it is absent."""
        self._known.add(name)
        return self.content.get(name)

    def number(self, name: str) -> float:
        """A number of at most LARGEST."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise self._wrong(name, "a number")
        return float(value)

    def whole(self, name: str) -> int:
        """A whole number above 0, also one written as 4.0."""
        value = self.get(name)
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        if not is_whole or value < 1:
            raise self._wrong(name, "a whole number above 0")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return default if value is None else value

    def text(self, name: str) -> str | None:
        """A text, None where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object, empty where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "a JSON object")
        return dict(value or {})

    def must_be(self, name: str, *plain: Any, what: str) -> None:
        """Refuse a value that is neither absent nor one of `plain`; `what` says what can be read."""
        value = self.get(name)
        if name in self.content and value not in plain:
            raise GranaryError(f"{self.where} has {name}={value!s:.40}: {what} can be read")

    def close(self) -> None:
        """See `Source.close`."""
        if unknown := sorted(self.content.keys() - self._known):
            raise GranaryError(f"{self.where} has the key {unknown[0]}, {UNKNOWN.format(unknown[0])}")

    def _wrong(self, name: str, wanted: str) -> GranaryError:
        if name not in self.content:
            return GranaryError(f"{self.where} lacks the key {name}")
        return GranaryError(f"{self.where} has {name}={self.content[name]!r:.40}, which is not {wanted}")


class Tensors:
    """The tensors of a file."""

    def __init__(self, found: Mapping[str, Tensor], where: Path, harmless: Collection[str]) -> None:
        self.found, self.where = dict(found), where
        self._known = set(harmless)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a tensor, (0, 0) where it is absent or no matrix: `take` then says so."""
        shape = tuple(self.found[name].shape) if name in self.found else ()
        return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)

    def take(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
        """The named tensors in order; raises GranaryError for one that is missing or of another shape or type."""
        taken = []
        for name, shape in shapes.items():
            self._known.add(name)
            if name not in self.found:
                raise GranaryError(f"{self.where} lacks the tensor {name}")
            tensor = self.found[name]
            if tuple(tensor.shape) != shape:
                raise GranaryError(f"{self.where}: {name} has shape {tuple(tensor.shape)}, not {shape}")
            if not tensor.is_floating_point():
                raise GranaryError(f"{self.where}: {name} is of {tensor.dtype}, not of a float type")
            taken.append(tensor)
        return taken

    def scalar(self, name: str) -> float:
        """The value of a tensor of one element, of any type."""
        self._known.add(name)
        if name not in self.found or self.found[name].numel() != 1:
            raise GranaryError(f"{self.where} has no tensor {name} of one number")
        return float(self.found[name].item())

    def close(self) -> None:
        """See `Source.close`."""
        if unknown := sorted(self.found.keys() - self._known):
            raise GranaryError(f"{self.where} has the tensor {unknown[0]}, {UNKNOWN.format(unknown[0])}")
