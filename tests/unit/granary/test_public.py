"""The names of the public package: all there, each loaded when it is used and not before."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import granary


def test_every_name_is_the_one_of_its_home() -> None:
    for name in granary.__all__:
        value = getattr(granary, name)
        if name != "__version__":
            assert value is getattr(importlib.import_module(granary._HOMES[name]), name)
    assert dir(granary) == sorted(granary.__all__)


def test_types_and_names_come_from_the_same_homes() -> None:
    tree = ast.parse(Path(granary.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_types = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_types == granary._HOMES
    assert {*granary._HOMES, "__version__"} == set(granary.__all__)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Sae", ": did you mean SAE?"), ("load_confg", ": did you mean load_config or "), ("qqqq", "")],
)
def test_an_unknown_name_names_those_nearest(name: str, hint: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(granary, name)
    assert str(caught.value).startswith(f"module 'granary' has no attribute '{name}'{hint}")


def test_the_import_loads_nothing_until_a_name_is_used() -> None:
    script = (
        "import json, sys\nbefore = set(sys.modules)\nimport granary\n"
        "new = [n for n in set(sys.modules) - before if n.split('.')[0] not in sys.stdlib_module_names]\n"
        "from granary import GranaryError\nprint(json.dumps([new, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["granary"], False]
