"""The Python blocks of docs/intervention.md, run one after the other on the bundled model."""

import re
from pathlib import Path

import pytest

from tests.isolation import REPOSITORY
from tests.modules import sae_of

PAGE = "docs/intervention.md"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sae_of(128).save_pretrained("runs/demo/sae")
    text = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE, "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 5
