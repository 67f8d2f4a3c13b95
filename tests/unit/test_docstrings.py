"""What a public name's documentation begins with: a sentence of its own, not the rest of one that the name began."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.unit.test_house import FILES, ROOT

# "Of the latents held here.", "Until it is on disk.": they only say something beside the signature.
FRAGMENT = re.compile(
    r"(Of|By|As|Until|Before|From|With|Without|To|Also|At|In|Into|For|Between|Beside|After|On|Over|Like|Under|Not)\b"
    r"|(One|None|Always|Never|Left)\."
)


def public(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """(name, documentation) of what others may use."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{inside}{node.name}"
            yield name, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{name}.")


def test_no_docstring_is_half_a_sentence() -> None:
    found = [
        f"{path.relative_to(ROOT)} {name}: {text.splitlines()[0]}"
        for path in FILES
        for name, text in public(ast.parse(path.read_text()))
        if FRAGMENT.match(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["Of all ranks.", "Until it can.", "Always."])
def test_half_a_sentence_is_noticed(text: str) -> None:
    module = ast.parse(f'class A:\n    """A thing."""\n    def b(self):\n        """{text}"""\n')
    assert [name for name, found in public(module) if FRAGMENT.match(found)] == ["A.b"]
