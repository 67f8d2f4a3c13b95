"""A URL that grants access stands in no file and on no line of any stage; what it grants is used all the same."""

from pathlib import Path

import pytest

from tests.cli import ForkServer
from tests.disk_commands import INSPECT, TRAIN
from tests.inspection import small_sae, small_store

SECRET = "hush"
STORE = f"store?X-Amz-Date=1&X-Amz-Signature={SECRET}"
STAGES = {
    "train": ("stage_train", *TRAIN),
    "packed": ("stage_train", "-m", *TRAIN, "packed=true", "optim.lr=1e-3,2e-3"),
    "eval": ("stage_eval", "sae.path=dictionary", "contexts=1", "downstream=false"),
    "inspect": ("stage_inspect", "sae.path=dictionary", *INSPECT),
    "plan": ("stage_train.plan", *TRAIN),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store under a name like a signed URL's, and a dictionary."""
    made = tmp_path_factory.mktemp("secrets")
    small_store(made / STORE, num_contexts=9)
    small_sae(made / "dictionary")
    return made


# Packed runs learn in a process that imports everything anew.
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow) if stage == "packed" else stage for stage in STAGES]
)
def test_a_signature_is_used_and_kept_nowhere(stages: ForkServer, root: Path, tmp_path: Path, stage: str) -> None:
    where = [] if stage == "plan" else [f"run_dir={tmp_path}"]
    done = stages.at(root).run(*STAGES[stage], *where, f"store.url='{STORE}'")
    assert done.code == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("module", ["stage_train", "stage_eval", "stage_inspect", "stage_train.plan"])
def test_a_password_is_refused_and_shown_nowhere(stages: ForkServer, tmp_path: Path, module: str) -> None:
    done = stages.at(tmp_path).run(module, f"store.url=ftp://me:{SECRET}@127.0.0.1:1/x")
    assert done.code == 2
    assert "holds a password" in done.error
    assert SECRET not in done.stdout + done.stderr
    assert not any(tmp_path.rglob("*"))
