"""A cross-layer transcoder by the configuration's own words, with the trainer, checkpoints and export of every kind."""

from typing import Any

import pytest

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import CLT, load
from tests.training import Runs, assert_same_run

HOOKS = tuple(f"layers.{layer}.{site}" for layer in (9, 10, 11) for site in ("mlp_in", "mlp_out"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_configs: None, planted_store: Any) -> Runs:
    folder = tmp_path_factory.mktemp("clt")
    planted_store(folder / "store", hooks=HOOKS)
    return Runs(
        folder, "variant=clt", "sae=batchtopk", "reads=layers.*.mlp_in", "writes=layers.*.mlp_out", "sae.expansion=4",
        "schedule.tokens=1_000", "sae.k=6",
    )  # fmt: skip


def test_f21_f49_stopped_and_continued_with_metrics_per_target(runs: Runs) -> None:
    """The metrics of every written site and every layer are on, and the dead counters of all layers survive."""
    straight = runs("straight")
    made = load(straight)
    assert isinstance(made, CLT)
    assert made.sites is not None
    assert made.sites.reads == ("layers.9.mlp_in", "layers.10.mlp_in", "layers.11.mlp_in")
    lines = read_metrics(straight)
    for layer in (9, 10, 11):
        assert 0 < lines[-1][f"fvu/layers.{layer}.mlp_out"] < lines[0][f"fvu/layers.{layer}.mlp_out"]
    mean = sum(lines[-1][f"fvu/layers.{layer}.mlp_out"] for layer in (9, 10, 11)) / 3
    assert lines[-1]["fvu"] == pytest.approx(mean, rel=1e-5)
    for name in ("l0", "dead_fraction"):
        of_layers = [lines[-1][f"{name}/layers.{layer}.mlp_in"] for layer in (9, 10, 11)]
        whole = sum(of_layers) if name == "l0" else sum(of_layers) / 3
        assert lines[-1][name] == pytest.approx(whole, rel=1e-5)
        assert max(of_layers) > 0
    runs.stopped("broken", step=30)
    assert_same_run(straight, runs("broken"))


def test_jumprelu_learns(runs: Runs) -> None:
    words = ("sae=jumprelu", "sae.k=null", "sae.penalty=tanh", "sae.penalty_weight=1e-3", "sae.bandwidth=0.5")
    lines = read_metrics(runs("jumprelu", *words, "optim.micro_batch=7"))
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]


def test_what_a_clt_cannot_be(runs: Runs) -> None:
    with pytest.raises(GranaryError, match="reads one site per layer and writes as many, not 3 and 1"):
        runs("bad", "writes=layers.9.mlp_out")
