"""A Lorsa on two processes, its contexts or its heads shared out, is that of one; cut by rows it is refused."""

import shlex
from typing import Any

import pytest

from tests.layouts import Trainings

pytestmark = pytest.mark.slow

READS, WRITES = "layers.1.attn_in", "layers.1.attn_out"
WORDS = shlex.split(
    "variant=lorsa variant.attention=plain variant.qk_init=random variant.qk_heads=4 variant.qk_width=3 sae.k=3 "
    "sae.expansion=2 sae.dead_after_tokens=60 sae.auxk_alpha=0.5 store.url=store run_dir=. stream.batch_size=64 "
    "schedule.tokens=1120 logger.progress=false logger.curves=false checkpoint.every=0 device.threads=1 optim.lr=3e-3 "
    f"reads={READS} writes={WRITES}"
)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Trainings:
    folder = tmp_path_factory.mktemp("lorsa")
    planted_store(folder / "store", hooks=(READS, WRITES))
    return Trainings(folder, WORDS)


@pytest.mark.parametrize("sae", ["topk", "batchtopk", "jumprelu"])
def test_twenty_steps_on_two_processes(train: Trainings, sae: str) -> None:
    train.assert_as_one(sae, ("ddp", "latent"), f"sae={sae}", *(["sae.k=null"] if sae == "jumprelu" else []))


def test_what_does_not_divide_is_refused(train: Trainings) -> None:
    done = train("rows", "nproc=2", "parallel=fsdp")
    assert "error: parallel=fsdp cuts matrices by rows of latents, and a lorsa's heads serve many" in done.stderr
    done = train("odd", "nproc=2", "parallel=latent", "variant.qk_heads=3")
    assert "error: the 3 heads of queries and keys do not divide among parallel.latent=2" in done.stderr
    done = train("few", "nproc=2", "parallel=ddp", "stream.batch_size=16")
    assert "error: stream.batch_size=16: 1 contexts do not divide among 2 processes" in done.stderr
