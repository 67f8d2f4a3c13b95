"""A harvest that cannot fit on the disk is refused before anything is written."""

import subprocess
import sys
from pathlib import Path


def test_no_room_is_one_line_and_writes_no_store(tmp_path: Path) -> None:
    overrides = ["corpus.contexts=1000000000", f"run_dir={tmp_path}"]  # a petabyte of activations
    command = [sys.executable, "-m", "stage_harvest", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "free" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()
