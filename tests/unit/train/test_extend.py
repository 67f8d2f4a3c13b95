"""A finished run goes on when it is asked for more tokens; a run begins with the weights of an SAE."""

import logging

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from tests.training import Runs, assert_same_weights, weights

pytestmark = pytest.mark.usefixtures("train_configs")

FLAT = ("schedule=constant", "schedule.warmup=4")


@pytest.mark.parametrize("length", ["tokens", pytest.param("epochs", marks=pytest.mark.slow)])
def test_a_longer_run_is_as_if_it_had_been_asked_for(train: Runs, length: str) -> None:
    short, long = (f"schedule.tokens={tokens}" for tokens in (320, 640))
    if length == "epochs":
        short, long = (f"schedule.tokens=null schedule.epochs={epochs}" for epochs in (1, 2))
    straight = train("straight", *FLAT, *long.split())
    train("a", *FLAT, *short.split())
    out = train("a", *FLAT, *long.split())
    assert_same_weights(straight, out)
    steps = [line["step"] for line in read_metrics(out)]
    assert steps == sorted(set(steps))
    assert steps[-1] == read_metrics(straight)[-1]["step"]


def test_it_goes_on_from_before_the_decay_where_that_is_kept(train: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """Of 21 steps the last 8 decay. What is left of the decay in the folder gives way to the longer run."""
    few = ("checkpoint.every=5", "checkpoint.keep=4", "schedule.warmup=2", "schedule.tokens=320")
    out = train("a", *few)
    with caplog.at_level(logging.INFO):
        train("a", *few, "schedule.tokens=640")
    assert (
        "schedule.tokens was 320, is 640; from step 10, its last checkpoint before the learning rate's" in caplog.text
    )
    rates = {line["step"]: line["lr"] for line in read_metrics(out)}
    assert list(rates) == [*range(5, 41, 5), 42]
    assert rates[10] == rates[25]
    names = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in (30, 35, 40, 42)]


def test_it_goes_on_from_the_end_where_nothing_else_is_kept(train: Runs, caplog: pytest.LogCaptureFixture) -> None:
    train("a", "schedule.tokens=320")
    with caplog.at_level(logging.INFO):
        train("a", "schedule.tokens=640")
    assert "from its last checkpoint, step 21, although the learning rate has decayed since step 13" in caplog.text


def test_a_shorter_run_is_another(train: Runs) -> None:
    train("a")
    with pytest.raises(GranaryError, match=r"schedule\.tokens was 640, is 320"):
        train("a", "schedule.tokens=320")


def test_a_run_begins_with_the_weights_of_an_sae(train: Runs) -> None:
    first = train("first", "schedule.tokens=4_000", "optim.lr=0.02")
    small = ("optim.lr=1e-9", "schedule.tokens=16", "seed=5", f"init_from={first}")
    for name, tensor in weights(train("b", *small)).items():
        torch.testing.assert_close(tensor, weights(first)[name], atol=1e-6, rtol=1e-6)
    assert read_metrics(train("c", *small))[0]["fvu"] < 0.7 * read_metrics(train("anew", *small[:3]))[0]["fvu"]
    assert SAE.from_pretrained(train("k", *small, "sae.k=2")).config.k == 2


def test_weights_that_mean_something_else_are_refused(train: Runs) -> None:
    first = train("first", "schedule.tokens=16")
    for change, line in (
        ("sae.expansion=4", "d_latent is 96 there, 48 here"),
        ("sae.normalisation=none", "normalisation is .* there, none here"),
        ("sae=batchtopk", "activation is topk there, batchtopk here"),
    ):
        with pytest.raises(GranaryError, match=line):
            train("b", change, "sae.k=3", f"init_from={first}")
    with pytest.raises(GranaryError, match="nowhere"):
        train("c", "init_from=/nowhere")
