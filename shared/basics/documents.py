"""JSON that somebody else may have written: read, and compared with the types that it must have.

A file from a stranger is data. Whatever it holds, its reader gets values of the types it asked for, or raises one line
that names the file and the key.
"""

import json
import math
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from shared.basics.errors import GranaryError, first_line

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
SHOWN_CHARACTERS = 60


def parse_json(data: str | bytes, where: Path | str) -> Any:
    """The JSON value in `data`; raises GranaryError, naming `where`, for what is none.

    Half of a surrogate pair, which JSON can escape and no file name, terminal or UTF-8 file can hold, is refused.
    """
    try:
        value = json.loads(data)
        if rb"\ud" in data.lower() if isinstance(data, bytes) else r"\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise GranaryError(f"{where} is not JSON: {first_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises GranaryError where there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise GranaryError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise GranaryError(f"{path} can't be read: {error.strerror or error}") from None
    content = parse_json(data, path)
    if not isinstance(content, dict):
        raise GranaryError(f"{path} does not hold a JSON object")
    return content


def typed(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type `hint`; raises GranaryError, naming `where`, for a value of another type.

    A hint is a JSON type, a union with None, a Literal, a list, tuple or dict of hints, or a class with ``from_json``.
    A number without a fraction is a float too.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return typed(next(kind for kind in arguments if kind is not type(None)), value, where)
    is_plain = origin is list or (origin is tuple and arguments[-1] is ...)
    if is_plain and isinstance(value, list) and arguments[0] in JSON_TYPES and set(map(type, value)) <= {arguments[0]}:
        return origin(value)  # a long list of numbers, quickly
    if origin is list and isinstance(value, list):
        if arguments[0] is Any:
            return list(value)
        return [typed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(typed(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal and any(type(value) is type(one) and value == one for one in arguments):
        return value
    if hasattr(hint, "from_json"):
        return hint.from_json(value, where)
    if hint is float and type(value) is int:
        return value  # written as an integer by another program
    if hint in JSON_TYPES and type(value) is hint:
        return value
    wanted = " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", hint)
    raise GranaryError(f"{where} is {shortened(value)}, which is not of the type {wanted}")


def typed_fields(kind: type, value: Any, where: str) -> dict[str, Any]:
    """The fields of the dataclass `kind` from a JSON object, each of its type.

    Raises GranaryError for a value of another type, and for a missing key. Other keys are left to the caller.
    """
    assert is_dataclass(kind)
    found = typed(dict[str, Any], value, where)
    hints = typing.get_type_hints(kind)
    missing = [one.name for one in fields(kind) if one.name not in found]
    if missing:
        raise GranaryError(f"{where} lacks the key {missing[0]}")
    return {one.name: typed(hints[one.name], found[one.name], f"{where}.{one.name}") for one in fields(kind)}


def typed_at(content: Any, keys: str, hint: Any, where: Path | str) -> Any:
    """The value under dotted `keys` of a document that was read from `where`, as the type `hint`."""
    for key in keys.split("."):
        if not isinstance(content, dict) or key not in content:
            raise GranaryError(f"{where} lacks the key {keys}")
        content = content[key]
    return typed(hint, content, f"{where}: {keys}")


def shortened(value: object) -> str:
    """A value for an error: at most a few words of it."""
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
