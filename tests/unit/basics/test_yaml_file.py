"""YAML of any content is read, or is one line."""

import os
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.basics.yaml_file import read_yaml
from stage_eval.grid import RUN_RECORD, SWEEP_RECORD, is_of_grid, last_grid
from stage_train.many import read_list

BAD = {
    "torn": b"a: [1,\n",
    "bytes": b"\xff\xfe",
    "deep": b"[" * 1_000,
    "alias": b"- {name: &a [*a]}\n",
    "tag": b'- !!python/object/apply:os.system ["touch pwned"]\n',
    "scalar": b"7\n",
    "tabs": b"\ta: 1\n",
    "keys": b"? [1, 2]\n: 3\n",
}
WRONG = {
    "a number for a group": b"- sae: 5\n",
    "text for a number": b"- {schedule: {tokens: abc}}\n",
    "NaN for a whole number": b"- {sae: {k: .nan}}\n",
    "an unknown key": b"- {nosuch: 1}\n",
    "a list for an entry": b"- [1]\n",
    "a number for an entry": b"- 7\n",
    "nothing": b"",
    "an interpolation of nothing": b"- {name: '${nosuch}'}\n",
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_what_is_no_yaml_names_the_file(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(GranaryError, match=r"x\.yaml") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "none.yaml", "."):
        with pytest.raises(GranaryError, match="is not there, or no file"):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("content", [*BAD.values(), *WRONG.values()], ids=[*BAD, *WRONG])
def test_a_wrong_list_of_runs_is_one_line(content: bytes, tmp_path: Path, train_configs: None) -> None:
    (tmp_path / "packed.yaml").write_bytes(content)
    with pytest.raises(GranaryError, match=r"packed\.yaml") as caught:
        read_list(tmp_path / "packed.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [*BAD.values(), b"hydra: 3\n", b"hydra: {overrides: {task: ['a=[']}}\n"])
def test_a_wrong_record_of_a_sweep(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SWEEP_RECORD).write_bytes(content)
    with pytest.raises(GranaryError, match=r"multirun\.yaml"):
        last_grid(tmp_path)
    (tmp_path / RUN_RECORD).parent.mkdir()
    (tmp_path / RUN_RECORD).write_bytes(content)
    assert not is_of_grid(tmp_path, set())
