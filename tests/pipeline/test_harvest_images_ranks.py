"""Rows with images under tensor parallelism, in real gloo processes: the text stack split, the tower whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.store import Store
from shared.store.verify import verify
from tests.cli import ForkServer
from tests.harvesting import ENVIRONMENT
from tests.picture_models import FAMILIES

pytest.importorskip("PIL")
from tests.picture_harvests import SITES, Pictures

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("harvest_worker.py")
REFUSED = "qwen3_vl"
SPLIT = [family for family in FAMILIES if family != REFUSED]
TOLERANCE = 1e-5  # sums of float32 are taken in another order


@pytest.fixture(scope="module")
def rehearsal(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pictures]:
    """Of every family a store of one process, and one of two that share the model."""
    made, jobs = {}, []
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        made[family] = Pictures(family, root, stages.at(root), num_key_value_heads=2)
        if family != REFUSED:
            # Five: the images of a shard are not those of the next, so a rank that takes others' is found.
            made[family].harvest("one", store__shard_contexts=5)
            jobs.append(made[family].arguments("two", tensor_parallel=2, store__shard_contexts=5))
    launch = [sys.executable, "-m", "shared.launch.torchrun", "--standalone", "--nproc-per-node=2", str(WORKER)]
    empty = tmp_path_factory.mktemp("none")
    run = subprocess.run(
        [*launch, str(empty), json.dumps(jobs)], env=ENVIRONMENT, capture_output=True, text=True, cwd=empty, timeout=590
    )
    assert run.returncode == 0, run.stderr
    return made


@pytest.mark.parametrize("family", SPLIT)
def test_two_ranks_give_the_activations_of_one(rehearsal: dict[str, Pictures], family: str) -> None:
    root = rehearsal[family].root
    one, two = Store.open(root / "one"), Store.open(root / "two")
    assert verify(str(root / "two")).intact
    contexts = range(one.num_contexts)
    assert np.array_equal(one.tokens(contexts), two.tokens(contexts))
    assert np.array_equal(one.pictures.cell(contexts), two.pictures.cell(contexts))
    for context in contexts:
        for kinds in (["image"], ["text", "assistant"]):
            chosen_T = one.pictures.chosen([context], kinds)[0]
            for site in SITES:
                wanted, got = (store.read_context(site, context)[chosen_T] for store in (one, two))
                assert (got - wanted).norm() <= TOLERANCE * wanted.norm(), (site, context, kinds)


def test_latents_split_over_two_ranks_are_trained_from_it(rehearsal: dict[str, Pictures]) -> None:
    """The SAE of two ranks, each with half of the latents, is that of one rank from the same store."""
    pictures = rehearsal["qwen2_5_vl"]
    losses = {}
    for name, layout in (("plain", []), ("latent", ["nproc=2", "parallel=latent"])):
        keys = [f"run_dir={pictures.root}/run", f"out_dir={pictures.root}/{name}", f"store.url={pictures.root}/two",
                f"hook={SITES[0]}", "stream.kinds=[image]", "sae.k=4", "sae.expansion=4", "stream.batch_size=64",
                "stream.lanes=4", "schedule.tokens=4096", "device.threads=1", *layout]  # fmt: skip
        command = [sys.executable, "-m", "stage_train", *keys]
        run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=pictures.root, timeout=300)
        assert run.returncode == 0, run.stderr
        lines = (pictures.root / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses["plain"]) > 2
    assert losses["latent"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["plain"][-1] < 0.9 * losses["plain"][0]


def test_a_text_stack_without_a_plan_is_refused_in_one_line(rehearsal: dict[str, Pictures]) -> None:
    result = rehearsal[REFUSED].run("refused", tensor_parallel=2, nproc=2)
    assert result.code == 2
    assert "transformers has no tensor-parallel plan for qwen3_vl_text: use tensor_parallel=1" in result.stderr
    assert "Traceback" not in result.stderr
