"""A harvest that cannot fit on the disk is refused before anything is written."""

from pathlib import Path

from tests.cli import ForkServer


def test_no_room_is_one_line_and_writes_no_store(stages: ForkServer, tmp_path: Path) -> None:
    overrides = ["corpus.contexts=1000000000", f"run_dir={tmp_path}"]  # a petabyte of activations
    done = stages.at(tmp_path).run("stage_harvest", *overrides)
    assert done.code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "free" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()
