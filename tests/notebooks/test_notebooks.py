"""The notebooks run from their first cell to the last, in an empty folder, and say what they said before."""

import os
from pathlib import Path

import pytest

from tests.cli import REPOSITORY

pytestmark = pytest.mark.notebooks
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# Of what a notebook prints, words that must come again; figures are those of a machine.
SAYS = {
    "ten_minutes": ("loss recovered", "fires on", "---"),
    "a_study": ("layers.1.resid_post k  32", "layer 1: L0", "layer 2: L0"),
    "transcoders_and_a_graph": ("loss recovered", "nodes", "edges"),
    "shapes_in_pictures": ("held-out captions are right", "learnt SAE: IoU", "->"),
    "your_own_module": ("of 60 planted directions", "mean change"),
}


def test_each_is_known() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    said = "".join(one.get("text", "") for one in outputs if one.get("name") == "stdout")
    for words in SAYS[path.stem]:
        assert words in said, said
