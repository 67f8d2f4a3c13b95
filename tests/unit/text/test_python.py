"""Concepts of Python by name, and the tokens that share characters with them."""

import numpy as np

from shared.latents.vocabulary import Vocabulary
from shared.text import python
from shared.text.documents import document, touched
from shared.text.python import is_python, parsed_length
from tests.planted import SOURCE


def texts(name: str, source: str = SOURCE) -> list[str]:
    return [source[start:stop] for start, stop in python.spans(source)[name]]


def test_concepts_of_python() -> None:
    assert texts("docstring") == ['"""Module text."""', '"""A dog."""']
    assert texts("string")[:3] == ['"""Module text."""', '"""A dog."""', '"no"']
    assert texts("comment") == ["# noise"]
    assert texts("number") == ["3", "0x1F", "1.5"]
    assert texts("self") == ["self"] * (3 if len(texts("string")) > 4 else 2)
    assert texts("constant") == ["True", "None", "None"]
    assert texts("after def") == ["bark"]
    assert texts("after class") == ["Dog"]
    assert texts("parameter") == ["self", "times", "loud"]
    assert texts("decorator") == ["@", "wraps", "(", "x", ")"]
    assert texts("import") == ["os", "path", "a", "b", "c"]
    assert texts("call") == ["wraps", "ValueError", "bark"]
    assert texts("exception") == ["ValueError"]
    assert "bark" in texts("attribute")
    assert texts("indentation") == ["    ", "    ", "        ", "        "]
    assert texts("keyword")[:4] == ["import", "as", "from", "import"]


def test_what_is_no_python_ends_it_quietly() -> None:
    assert python.spans("def f(:\n  'unclosed\n")["after def"]
    assert python.spans("")["string"] == []
    assert python.spans("\x00 $$ ???\n'''open")["docstring"] == []


def test_tokens_share_characters_with_spans() -> None:
    vocabulary = Vocabulary.of([b"<s>", b"caf\xc3", b"\xa9 x", b" y", b"\xff"], special=[0])
    whole = document(np.array([0, 1, 2, 3]), np.arange(4), vocabulary)
    assert whole.text == "café x y"
    marks = touched(whole, [(whole.text.index("é"), whole.text.index("é") + 1), (7, 8)])
    assert marks.tolist() == [False, True, True, True] or marks.tolist() == [False, False, True, True]
    broken = document(np.array([4, 3]), np.arange(2), vocabulary)
    assert touched(broken, [(1, 3)]).tolist() == [False, True]


def test_source_is_told_from_prose() -> None:
    assert is_python(["import os\n", "def f(): pass\n", "Once upon a time"])
    assert not is_python(["Once upon a time", "there", "x = 1\n"])
    assert not is_python([])


def test_how_much_of_a_text_is_python() -> None:
    assert parsed_length(SOURCE) == len(SOURCE)
    for cut in range(SOURCE.index("def bark"), len(SOURCE) - 1, 7):
        assert parsed_length(SOURCE[:cut]) in (SOURCE.index("@wraps"), cut)
    assert parsed_length("x = 1\n" + "it's prose, not code\n" * 40) == 0
    assert parsed_length("x = 1\nprint 2\n") == len("x = 1\n")
    assert parsed_length("It is a truth universally acknowledged.") == parsed_length("") == 0
