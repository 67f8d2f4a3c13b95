"""The docstrings under the fields of a class, which Python itself does not keep: read from its source."""

import ast
import inspect
import sys
from functools import cache


@cache
def _of_module(module: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Class to field to (annotation, docstring) of one module; a member of an enum has no annotation."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found.setdefault(node.name, {})
        for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name, annotation = statement.target.id, ast.unparse(statement.annotation)
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name, annotation = statement.targets[0].id, ""
            else:
                continue
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            fields[name] = (annotation, text)
    return found


def annotations(cls: type) -> dict[str, str]:
    """Fields of a class and its bases as their source writes their types."""
    return {name: annotation for name, (annotation, _) in _fields(cls).items()}


def docs(cls: type) -> dict[str, str]:
    """What is written under the fields of a class and its bases, on one line each; "" where nothing is.

    A class whose fields repeat those of others names these in ``documented_in``, where each has its one docstring.
    """
    found = {name: text for name, (_, text) in _fields(cls).items()}
    homes: tuple[type, ...] = getattr(cls, "documented_in", ())
    for home in homes:
        found |= {name: text for name, text in docs(home).items() if name in found and not found[name]}
    return found


def _fields(cls: type) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__ in sys.modules and hasattr(sys.modules[base.__module__], "__file__"):
            found |= _of_module(base.__module__).get(base.__name__, {})
    return found
