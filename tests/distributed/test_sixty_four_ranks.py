"""A smoke test of the coordination of many: 64 real processes on one machine, over one store.

They are forked from one that has imported everything, so that they fit into the memory of a small machine.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.store import Store
from shared.store.verify import verify
from tests.cli import ForkServer
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.harvesting import Harvester, same_files
from tests.training import weights

pytestmark = pytest.mark.slow
RANKS, SECONDS = 64, 900
TINY = ["sae.k=3", "sae.expansion=8", "stream.batch_size=192", "stream.lanes=64", "schedule.tokens=768"]
TINY += ["logger.progress=false", "logger.curves=false", "logger.every=1", "checkpoint.every=2", "device.threads=1"]


def run_ranks(server: ForkServer, stage: str, *arguments: str) -> None:
    """A stage in `RANKS` processes, with the environment that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    children = [server.start(stage, *arguments, variables=fixed | own) for own in numbers]
    for rank, child in enumerate(children):
        result = child.finish(SECONDS)
        assert result.code == 0, f"rank {rank}: {result.stderr}"


@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") < 8 << 30, reason="needs 8 GB of memory")
def test_sixty_four_ranks_harvest_what_one_does(stages: ForkServer, tmp_path: Path) -> None:
    harvester = Harvester(tmp_path, stages.at(tmp_path))
    harvester.documents *= 8
    harvester.corpus.write_text("\n---\n".join(harvester.documents))
    alone = harvester.harvest("alone", store__shard_contexts=1)
    assert alone.num_shards > RANKS
    run_ranks(stages.at(tmp_path), "stage_harvest", *harvester.arguments("many", store__shard_contexts=1))
    assert verify(str(tmp_path / "many")).intact
    assert same_files(tmp_path / "alone", tmp_path / "many") > 3 * alone.num_shards


@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") < 8 << 30, reason="needs 8 GB of memory")
def test_sixty_four_ranks_train_what_one_does(
    stages: ForkServer, tmp_path: Path, planted_store: Callable[..., Store]
) -> None:
    planted_store(tmp_path / "store", shards=40)
    arguments = [*TINY, f"store.url={tmp_path / 'store'}"]
    alone = stages.at(tmp_path).run("stage_train", *arguments, f"out_dir={tmp_path / 'one'}")
    assert alone.code == 0, alone.stderr
    run_ranks(stages.at(tmp_path), "stage_train", *arguments, "parallel=ddp", f"out_dir={tmp_path / 'many'}")
    first, second = (weights(tmp_path / name) for name in ("one", "many"))
    for name, tensor in first.items():
        assert_close_in_norm(second[name], tensor, SAME_RUN, f"{name} after the same batches, {REORDERED}")
