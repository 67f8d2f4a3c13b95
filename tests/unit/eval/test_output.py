"""Results replace the former ones as a whole, or not at all."""

import errno
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from shared.basics.errors import GranaryError
from stage_eval.output import EVALUATION, STAGING, Staged

CONTENT = {name: name.encode() for name in EVALUATION if name != "plots"} | {"plots/a.png": b"png"}


def stage_all(staged: Staged, mark: bytes) -> None:
    for name, content in CONTENT.items():
        staged.write(name, mark + content)


def evaluation(place: Path, mark: bytes) -> None:
    with Staged(place, EVALUATION) as staged:
        stage_all(staged, mark)
        staged.move_in()


def marks(place: Path) -> dict[str, bytes]:
    return {name: (place / name).read_bytes()[:3] for name in CONTENT if (place / name).exists()}


def test_new_results_take_the_place_of_the_former(tmp_path: Path) -> None:
    evaluation(tmp_path, b"old")
    (tmp_path / "plots/gone.png").write_bytes(b"of an evaluation with other plots")
    (tmp_path / "sae.safetensors").write_bytes(b"not ours")
    evaluation(tmp_path, b"new")
    assert marks(tmp_path) == dict.fromkeys(CONTENT, b"new")
    assert not (tmp_path / "plots/gone.png").exists()
    assert (tmp_path / "sae.safetensors").read_bytes() == b"not ours"
    assert not list(tmp_path.glob(f"{STAGING}*"))


@pytest.mark.parametrize("moves", range(9))
def test_a_process_that_dies_leaves_no_mixture(tmp_path: Path, moves: int) -> None:
    """Killed at any of its renames, in a process of its own: eval.json is never beside another evaluation's report."""
    evaluation(tmp_path, b"old")
    with warnings.catch_warnings(action="ignore"):  # the child imports and locks nothing
        child = os.fork()
    if not child:
        count = itertools.count()
        rename = Path.rename

        def die(self: Path, target: Any) -> Any:
            if next(count) == moves:
                os._exit(9)
            return rename(self, target)

        Path.rename = die  # type: ignore[method-assign]
        evaluation(tmp_path, b"new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (9 if moves < 8 else 0)
    found = marks(tmp_path)
    assert len(set(found.values())) <= 1
    if "eval.json" in found:
        assert len(found) == len(CONTENT)
    evaluation(tmp_path, b"new")
    assert marks(tmp_path) == dict.fromkeys(CONTENT, b"new")


def interrupted(place: Path) -> None:
    with Staged(place, EVALUATION) as staged:
        stage_all(staged, b"new")
        raise KeyError


def test_a_fault_while_it_is_made_leaves_the_former_results(tmp_path: Path) -> None:
    evaluation(tmp_path, b"old")
    with pytest.raises(KeyError):
        interrupted(tmp_path)
    assert marks(tmp_path) == dict.fromkeys(CONTENT, b"old")
    assert not list(tmp_path.glob(f"{STAGING}*"))


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation(tmp_path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GranaryError, match="No space left on device"):
        evaluation(tmp_path, b"new")
    assert marks(tmp_path) == dict.fromkeys(CONTENT, b"old")
    assert not list(tmp_path.glob(f"{STAGING}*"))


def test_what_died_is_cleared_away_and_what_is_at_work_stays(tmp_path: Path) -> None:
    died = tmp_path / f"{STAGING}1234" / "new"
    died.mkdir(parents=True)
    with Staged(tmp_path, EVALUATION) as other:
        evaluation(tmp_path, b"new")
        assert {path.name for path in tmp_path.glob(f"{STAGING}*")} == {other.staging.name}
        stage_all(other, b"two")
        other.move_in()
    assert marks(tmp_path) == dict.fromkeys(CONTENT, b"two")
    assert not list(tmp_path.glob(f"{STAGING}*"))
