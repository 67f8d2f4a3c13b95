"""A MoLT on two processes, whole or split by transforms, is that of one; cut by rows it is refused."""

import shlex
from typing import Any

import pytest

from tests.layouts import Trainings

pytestmark = pytest.mark.slow

READS, WRITES = "layers.1.mlp_in", "layers.1.mlp_out"
WORDS = shlex.split(
    "variant=molt 'variant.ranks={4:2,2:4,1:2}' sae.k=2 sae.dead_after_tokens=30 sae.auxk_alpha=0.5 store.url=store "
    "run_dir=. stream.batch_size=16 stream.lanes=4 schedule.tokens=320 logger.progress=false logger.curves=false "
    f"checkpoint.every=0 device.threads=1 optim.lr=3e-3 reads={READS} writes={WRITES}"
)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Trainings:
    folder = tmp_path_factory.mktemp("molt")
    planted_store(folder / "store", hooks=(READS, WRITES))
    return Trainings(folder, WORDS)


@pytest.mark.parametrize("sae", ["topk", "batchtopk", "jumprelu"])
def test_twenty_steps_on_two_processes(train: Trainings, sae: str) -> None:
    train.assert_as_one(sae, ("ddp", "latent"), f"sae={sae}", *(["sae.k=null"] if sae == "jumprelu" else []))


def test_what_does_not_divide_is_refused(train: Trainings) -> None:
    done = train("rows", "nproc=2", "parallel=fsdp")
    assert (
        "error: parallel=fsdp cuts matrices by rows, and the rows of a molt's transform belong together" in done.stderr
    )
    done = train("odd", "nproc=2", "parallel=latent", "variant.ranks={4:1,2:3}")
    assert "error: the 1 transforms of rank 4 do not divide among parallel.latent=2" in done.stderr
