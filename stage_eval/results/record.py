"""Dataclasses that are JSON documents: written, read back with every key and type checked, and described by a schema.

JSON has neither NaN nor infinity, so a figure that is undefined (a share of nothing) is None from the moment its record
is made; whoever reads a record in memory sees what a reader of the file sees.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Self

from shared.basics.documents import JSON_TYPES, typed
from shared.basics.errors import GranaryError

Json = dict[str, Any]
"""An object whose keys belong to somebody else, such as the record that a harvest left in its store."""

OPTIONAL = {"left_out": True}
"""Metadata of a field that is None by default, and whose key is not written then."""


class Record:
    """Base of frozen keyword-only dataclasses whose fields are numbers, strings, lists, dicts and other records."""

    def __post_init__(self) -> None:
        """Replace what JSON can't hold by None."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, item.name, finite(getattr(self, item.name)))

    def to_json(self) -> Json:
        """Plain JSON types under the names of the fields, in their order."""
        document = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if value is not None or not item.metadata.get("left_out"):
                document[item.name] = plain(value)
        return document

    @classmethod
    def from_json(cls, document: Any, where: str = "") -> Self:
        """The inverse of `to_json`; `where` names the place of the document in the whole for errors.

        Raises GranaryError for a key that is missing or unknown, and for a value of another type.
        """
        if not isinstance(document, dict):
            raise GranaryError(f"{where or 'the document'} is not a JSON object")
        hints = typing.get_type_hints(cls)
        given = {}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name in document:
                given[item.name] = typed(hints[item.name], document[item.name], f"{where}.{item.name}".lstrip("."))
            elif not item.metadata.get("left_out"):
                raise GranaryError(f"{where or 'the document'} lacks the key {item.name}")
        unknown = sorted(set(document) - set(hints))
        if unknown:
            raise GranaryError(f"{where or 'the document'} has unknown keys {', '.join(unknown)}")
        return cls(**given)


def finite(value: Any) -> Any:
    """The value, with None for every float in it that is not a finite number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """The value with records as dicts and tuples as lists."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def schema(root: type[Record], title: str) -> Json:
    """The JSON schema (draft 2020-12) of a record; the records it holds are its ``$defs``."""
    definitions: Json = {}
    top = describe_record(root, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **top, "$defs": definitions}


def describe_record(kind: type[Record], definitions: Json) -> Json:
    """Keys of a record, which of them must be there, and that there are no others."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {
        "description": _summary(kind),
        "type": "object",
        "properties": {item.name: describe(hints[item.name], definitions) for item in fields},
        "required": [item.name for item in fields if not item.metadata.get("left_out")],
        "additionalProperties": False,
    }


def _summary(kind: type[Record]) -> str:
    return " ".join((kind.__doc__ or "").split())


def describe(hint: Any, definitions: Json) -> Json:
    """The schema of one type; a record is described once, in `definitions`, and referred to.

    Raises TypeError for a second record of the same name.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [describe(kind, definitions) for kind in arguments]}
    if origin is list:
        return {"type": "array", "items": describe(arguments[0], definitions)}
    if origin is tuple:
        items = [describe(kind, definitions) for kind in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": describe(arguments[1], definitions)}
    if issubclass(hint, Record):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # takes its place in the order; a record may hold itself
            definitions[hint.__name__] = describe_record(hint, definitions)
        elif definitions[hint.__name__].get("description", _summary(hint)) != _summary(hint):
            raise TypeError(f"two records are called {hint.__name__}")
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {"type": JSON_TYPES[hint]}
