"""A CLT on two processes, whole or sharded, is that of one; split by latents it is refused."""

import shlex
from typing import Any

import pytest

from tests.layouts import Trainings

pytestmark = pytest.mark.slow

HOOKS = tuple(f"layers.{layer}.{site}" for layer in range(3) for site in ("mlp_in", "mlp_out"))
WORDS = shlex.split(
    "variant=clt sae=batchtopk sae.k=6 sae.expansion=4 sae.dead_after_tokens=60 sae.auxk_alpha=0.5 store.url=store "
    "run_dir=. stream.batch_size=16 stream.lanes=4 schedule.tokens=320 logger.progress=false logger.curves=false "
    "checkpoint.every=0 device.threads=1 reads=layers.*.mlp_in writes=layers.*.mlp_out"
)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, planted_store: Any) -> Trainings:
    folder = tmp_path_factory.mktemp("clt")
    planted_store(folder / "store", hooks=HOOKS)
    return Trainings(folder, WORDS)


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_twenty_steps_on_two_processes(train: Trainings, tying: str) -> None:
    train.assert_as_one(tying, ("ddp", "fsdp"), f"variant.tying={tying}")


def test_latents_of_several_groups_are_not_split(train: Trainings) -> None:
    done = train("split", "nproc=2", "parallel=latent")
    assert done.returncode != 0
    assert (
        "error: parallel=latent splits the one group of latents of other dictionaries, a clt has its latents layer by "
        "layer: use parallel=layers, ddp or fsdp" in done.stderr
    )
