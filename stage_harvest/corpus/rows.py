"""From a row's field to a document: the one reader of values for JSON lines, Arrow columns and hub datasets.

A field is named by its key, or by a path into nested records (``meta.text``). Where it comes from a column, the
column's type says what it holds; JSON has no columns, and each value says it itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import Chat, Content

Kind = Literal["text", "chat", "ids"]
WANTED = "text, chat messages (role and content, or ShareGPT's from and value), or token ids"
# ShareGPT's names of those who speak.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def field_value(record: Any, field: str, where: str) -> Any:
    """The value of `field` in `record`: of a key of that very name, else along the path that its dots make.

    None where a record on the path is null. Raises GranaryError naming `where` and what there is instead.
    """
    if isinstance(record, Mapping) and field in record:
        return record[field]
    value, walked = record, ""
    for part in field.split("."):
        if value is None and walked:
            return None
        if not isinstance(value, Mapping) or part not in value:
            names = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise GranaryError(f"{where} has no field {field!r}: there are {names}{' in ' + walked if walked else ''}")
        value, walked = value[part], f"{walked}.{part}".lstrip(".")
    return value


def column_path(schema: "pyarrow.Schema", field: str, where: str) -> tuple[list[str], Kind | None]:
    """The path of a column in an Arrow schema, and what its type says it holds; None for a column of nulls alone.

    Raises GranaryError naming `where` for a column that is not there, or whose type is no document's.
    """
    if field in schema.names:
        path, found = [field], schema.field(field).type
    else:
        path = field.split(".")
        names, found = list(schema.names), None
        for depth, part in enumerate(path):
            if part not in names:
                inside = f" in {'.'.join(path[:depth])}" if depth else ""
                raise GranaryError(f"{where} has no column {field!r}: there are {', '.join(names)}{inside}")
            found = schema.field(part).type if found is None else found.field(part).type
            names = [member.name for member in found] if pyarrow.types.is_struct(found) else []
    return path, column_kind(found, f"{where}, column {field!r}")


def column_kind(found: "pyarrow.DataType", where: str) -> Kind | None:
    """What a column of this type holds; raises GranaryError naming `where` for any that holds no documents."""
    types = pyarrow.types
    if types.is_null(found):
        return None
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_string(found) or types.is_large_string(found) or types.is_string_view(found):
        return "text"
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        item = found.value_type
        if types.is_integer(item):
            return "ids"
        if types.is_struct(item):
            return "chat"
        if types.is_null(item):
            return None  # empty lists and nulls alone
    raise GranaryError(f"{where} is of type {found}: it must hold {WANTED}")


def column_content(value: Any, kind: Kind | None, where: str) -> Content | None:
    """A value out of a column of `kind` as a document's content; None for a null and for an empty list.

    Arrow gives every record of a column the same keys and fills the missing ones with null: those are taken out again,
    since a chat template may ask whether a key is there.
    """
    if kind is None:
        return None
    if kind == "chat" and value is not None:
        value = without_nulls(value)
    return as_content(value, where)


def as_content(value: Any, where: str) -> Content | None:
    """A value as a document's content; None for a null and for an empty list, which leave no trace.

    Raises GranaryError naming `where` for anything else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        if not value:
            return None
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return _token_ids(value, where)
        if all(isinstance(item, Mapping) for item in value):
            return Chat([_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)])
    raise GranaryError(f"{where} holds {_described(value)}: it must be {WANTED}")


def _token_ids(value: Sequence[int], where: str) -> npt.NDArray[np.int64]:
    try:
        return np.asarray(value, dtype=np.int64)
    except OverflowError as error:
        raise GranaryError(f"{where} holds {max(value, key=abs)}, which is no token id") from error


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One chat message with a role; ShareGPT's ``from`` and ``value`` are renamed."""
    if "role" in item and ("content" in item or "tool_calls" in item):
        return dict(item)
    if "from" in item and "value" in item:
        speaker = str(item["from"]).lower()
        if speaker not in SPEAKERS:
            raise GranaryError(f"{where} is from {item['from']!r}: known are {', '.join(SPEAKERS)}")
        others = {key: value for key, value in item.items() if key not in ("from", "value")}
        return {"role": SPEAKERS[speaker], "content": item["value"], **others}
    raise GranaryError(f"{where} has the keys {', '.join(map(str, item))}: a message needs role and content")


def without_nulls(value: Any) -> Any:
    """A list of messages without the null fields of their records, at any depth; any other value as it is.

    ``content`` stays: a message of tool calls alone has a null there in JSON too.
    """
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return value
    return [{key: _pruned(item) for key, item in m.items() if item is not None or key == "content"} for m in value]


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _described(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(kinds)}"
    return type(value).__name__
