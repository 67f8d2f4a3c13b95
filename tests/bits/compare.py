"""What counts as the same: two files of one name, bit for bit but for what time, place and version decide.

Objects of a store are compared as bytes, the tensors of safetensors files by name as bits, JSON key by key. What may
differ is listed here: ``IGNORED`` by its nature, ``MOVED`` by decision.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# A text or a number of a JSON document.
VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*')


@dataclass(frozen=True)
class Ignored:
    """A key of a JSON file, which may differ for this reason. Patterns; a key stands for all that is below it."""

    file: str
    key: str
    why: str


@dataclass(frozen=True)
class Moved:
    """A key of a JSON file, or a tensor of a safetensors file, that has another name since.

    `base` None: only the later code writes it. `head` None: only the earlier code does.
    """

    file: str
    base: str | None
    head: str | None
    why: str


IGNORED = (
    Ignored("*/zarr.json", "attributes.versions", "software versions, and the folder of the bundled model"),
    Ignored("*/extents/*.json", "record.documents.zarr.json.attributes.versions", "the same, in the extent's copy"),
    Ignored("*/extents/*.json", "record.plan.versions", "the same, in the extent's plan"),
    Ignored("*/extents/*.json", "crc32c", "the checksum of a record with versions in it"),
    Ignored("*/metrics.jsonl", "*.tokens_per_s", "time"),
    Ignored("*/metrics.jsonl", "*.wait_share", "time"),
    Ignored("*/config.json", "provenance.stores.*.url", "place"),
    Ignored("*/config.json", "provenance.versions", "software versions"),
    Ignored("*/eval.json", "created", "time"),
    Ignored("*/eval.json", "provenance.store.url", "place"),
    Ignored("*/eval.json", "environment", "versions and machine"),
    Ignored("*/eval.json", "provenance.sae.sha256", "the weights file holds config.json; its tensors are compared"),
    Ignored("*/eval.json", "provenance.sae.provenance", "a copy of config.json, whose differences are told there"),
    Ignored("*/comparison.json", "created", "time"),
    Ignored("*/comparison.json", "store.url", "place"),
    Ignored("*/comparison.json", "rows.*.n_contexts", "new: a small sample is told by it"),
    Ignored("*/comparison.json", "left_out", "new: runs that can't be scored yet"),
    Ignored("*/comparison.json", "rows.*.sha256", "the weights file holds config.json; its tensors are compared"),
)

# Every rename that the later code makes: Moved("*/eval.json", "sae.config", "sae.settings", "why").
MOVED: tuple[Moved, ...] = ()


def compare_files(
    name: str, base: Path, head: Path, ignored: Sequence[Ignored] = IGNORED, moved: Sequence[Moved] = MOVED
) -> list[str]:
    """Every difference between two files called `name`, the first first."""
    if not base.is_file() or not head.is_file():
        return [f"{name}: written by {'base' if base.is_file() else 'head'} alone"]
    moved = [entry for entry in moved if fnmatch(name, entry.file)]
    if name.endswith(".safetensors"):
        found = compare_tensors(read_tensors(base), read_tensors(head), moved)
    elif base.read_bytes() == head.read_bytes():
        found = []
    elif name.endswith((".json", ".jsonl")):
        patterns = [entry.key for entry in ignored if fnmatch(name, entry.file)]
        found = compare_json(read_json(base), read_json(head), patterns, moved) or compare_layout(base, head)
    else:
        found = [first_byte(base.read_bytes(), head.read_bytes())]
    return [f"{name}: {difference}" for difference in found]


def first_byte(base: bytes, head: bytes) -> str:
    """Where two unequal byte strings part."""
    place = next((i for i, (a, b) in enumerate(zip(base, head, strict=False)) if a != b), min(len(base), len(head)))
    return f"byte {place:,} differs ({len(base):,} bytes in base, {len(head):,} in head)"


# ---- tensors -------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; its metadata is not read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def compare_tensors(
    base: dict[str, torch.Tensor], head: dict[str, torch.Tensor], moved: Sequence[Moved] = ()
) -> list[str]:
    """Differences by name: absence, dtype, shape, bits."""
    base = {key: tensor for key, tensor in renamed(base, moved).items() if key is not None}
    added = {entry.head for entry in moved if entry.base is None}
    found = [f"{name} is in base alone" for name in sorted(base.keys() - head.keys())]
    found += [f"{name} is in head alone" for name in sorted(head.keys() - base.keys() - added)]
    for name in sorted(base.keys() & head.keys()):
        a, b = base[name], head[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            found.append(f"{name} is {describe(a)} in base, {describe(b)} in head")
        elif not torch.equal(bits(a), bits(b)):
            num = int((bits(a) != bits(b)).any(-1).sum())
            gap = float((a.double() - b.double()).abs().max())
            found.append(f"{name} differs in {num:,} of {a.numel():,}, max abs {gap:.3g}")
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes [numel, bytes of one]: NaN equals NaN of the same bits, and 0 is not -0."""
    return tensor.flatten().view(torch.uint8).view(tensor.numel(), tensor.element_size())


def describe(tensor: torch.Tensor) -> str:
    """``float32 [4, 8]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# ---- JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The document; the list of lines of a .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def compare_json(base: Any, head: Any, ignored: Sequence[str] = (), moved: Sequence[Moved] = ()) -> list[str]:
    """Keys whose values differ, and keys in another order."""
    first, second = (
        {key: value for key, value in flatten(document) if not any(below(key, pattern) for pattern in ignored)}
        for document in (base, head)
    )
    first = renamed(first, moved)
    added = [entry.head for entry in moved if entry.base is None and entry.head is not None]
    second = {key: value for key, value in second.items() if not any(below(key, name) for name in added)}
    found = []
    for key in [*first, *(key for key in second if key not in first)]:
        a, b = (json.dumps(leaves[key]) if key in leaves else "absent" for leaves in (first, second))
        if a != b:
            found.append(f"{key} is {shortened(a)} in base, {shortened(b)} in head")
    if not found and not moved and list(first) != list(second):
        key = next(a for a, b in zip(first, second, strict=True) if a != b)
        found.append(f"{key} has another place among the keys")
    return found


def compare_layout(base: Path, head: Path) -> list[str]:
    """Spaces and line ends, where the two hold the same keys."""
    first, second = read_json(base), read_json(head)
    if [key for key, _ in flatten(first)] != [key for key, _ in flatten(second)]:
        return []
    texts = (VALUE.sub("_", path.read_text(encoding="utf-8")) for path in (base, head))
    return [] if next(texts) == next(texts) else ["the spaces between the same values differ"]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a document under dotted keys; a text that is itself a JSON object is looked into."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            yield prefix, value
            return
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def below(key: str, pattern: str) -> bool:
    """Whether `key` is what `pattern` names, or part of it."""
    return fnmatch(key, pattern) or fnmatch(key, f"{pattern}.*")


def renamed(leaves: dict[str, Any], moved: Sequence[Moved]) -> dict[str, Any]:
    """`leaves` under the names that they have in the later code, without those that it does not write."""
    result = {}
    for key, value in leaves.items():
        entry = next((entry for entry in moved if entry.base is not None and below(key, entry.base)), None)
        if entry is None:
            result[key] = value
        elif entry.head is not None:
            result[entry.head + key[len(str(entry.base)) :]] = value
    return result


def shortened(text: str) -> str:
    """At most 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."
