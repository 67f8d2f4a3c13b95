"""The Python blocks of docs/attach.md, run one after the other with fewer tokens."""

import re
from pathlib import Path

import pytest

from tests.isolation import REPOSITORY

PAGE = "docs/attach.md"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        small = re.sub(r"tokens=[\d_]+", "tokens=2_048", block)
        exec(compile(small, PAGE, "exec"), names)
    assert sorted(path.name for path in (tmp_path / "runs/attached").iterdir()) == [
        "layers.2.resid_post",
        "model.layers.1.mlp.up_proj",
    ]
    assert (tmp_path / "runs/fitted/layers.1.mlp_out/metrics.jsonl").is_file()
