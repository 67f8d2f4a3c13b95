"""Harvests with quantised weights by the command line, and what the packages for it may not print."""

import subprocess
import sys

import pytest
import torch

from shared.store import Store
from tests.cli import ForkServer, Result
from tests.harvesting import ENVIRONMENT, Harvester

pytest.importorskip("torchao", reason="needs the extra quantised: make test-quantised")
pytest.importorskip("bitsandbytes", reason="needs the extra quantised: make test-quantised")

pytestmark = pytest.mark.quantised
BUNDLED = {"model": "bundled", "model__dtype": "bfloat16", "corpus__contexts": 8}
HOOK = "layers.1.resid_post"


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("quantised")
    harvester = Harvester(root, stages.at(root))
    harvester.harvest("exact", **BUNDLED)
    return harvester


def activations(store: Store) -> torch.Tensor:
    return torch.stack([store.read_context(HOOK, context).float() for context in range(store.num_contexts)])


def alone(harvester: Harvester, store: str, **changes: object) -> subprocess.CompletedProcess[str]:
    """The command in a Python of its own, which imports everything anew."""
    command = [sys.executable, "-m", "stage_harvest", *harvester.arguments(store, **changes)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=harvester.root, timeout=300)


def not_the_harvests(stderr: str) -> list[str]:
    """Lines that the harvest itself does not write."""
    starts = ("model ", "hooks ", "corpus ", "contexts ", "isolated ", "shards ", "to write ", "store ", "tokenise",
              "harvest", "expected ", "next ")  # fmt: skip
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and not line.startswith(starts)]


@pytest.mark.parametrize(("scheme", "tolerance"), [("torchao_int8", 0.03), ("bnb_int8", 0.05), ("bnb_nf4", 0.3)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_harvest_with_quantised_weights(harvester: Harvester, scheme: str, tolerance: float, dtype: str) -> None:
    store = f"{scheme}-{dtype}"
    result = harvester.run(store, **BUNDLED, model__quantisation=scheme, store__dtype=dtype)
    assert result.code == 0, result.stderr
    assert f"model     bundled, bfloat16 with {scheme} weights on cpu, 2 of 4 layers" in result.stderr
    assert not_the_harvests(result.stderr) == []
    written = Store.open(harvester.root / store)
    assert written.plan.provenance["model"]["quantisation"] == scheme
    assert (written.plan.provenance["model"]["dtype"], written.plan.dtype) == ("bfloat16", dtype)
    exact = activations(Store.open(harvester.root / "exact"))
    error = (activations(written) - exact).norm() / exact.norm()
    assert 1e-4 < error < tolerance
    error_of_that = harvester.run(store, **BUNDLED, store__dtype=dtype).error
    assert f"provenance.model.quantisation is {scheme}, not absent" in error_of_that


def test_only_the_harvest_itself_is_shown(harvester: Harvester) -> None:
    """A process of its own: what the packages say when they are imported must not show either."""
    changes = {**BUNDLED, "model__quantisation": "bnb_int8"}  # transformers imports torchao by itself
    run = alone(harvester, "shown", **changes)
    assert run.returncode == 0, run.stderr
    assert not_the_harvests(run.stderr) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "no model folder at ./nowhere"),
        ({"model__quantisation": "int3"}, "model.quantisation=int3: choose from bnb_int8, bnb_nf4, torchao_int8"),
    ],
)
def test_an_error_is_one_line_beside_these_packages(
    harvester: Harvester, changes: dict[str, object], message: str
) -> None:
    assert message in harvester.run("refused", **changes).error


def test_an_error_of_ranks_is_one_line_beside_these_packages(harvester: Harvester) -> None:
    """Processes of their own, in each of which the packages are imported and have their say."""
    run = alone(harvester, "refused", model__quantisation="bnb_nf4", nproc=2, tensor_parallel=2)
    assert "does not go with tensor_parallel" in Result(run.returncode, run.stdout, run.stderr).error
