"""A transcoder by the configuration's own words, with the trainer, stream, checkpoints and export of every variant."""

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import SkipTranscoder, Transcoder, load
from shared.sae.folder import describe
from shared.sae.sites import Sites
from shared.store import Store
from tests.training import Runs, assert_same_run

READS, WRITES = "layers.1.mlp_in", "layers.1.mlp_out"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_configs: None, planted_store: object) -> Runs:
    folder = tmp_path_factory.mktemp("transcoder")
    assert callable(planted_store)
    planted_store(folder / "store", hooks=(READS, WRITES, "layers.1.resid_post"))
    return Runs(folder, "variant=transcoder", f"reads={READS}", f"writes={WRITES}", "schedule.tokens=2_000")


@pytest.mark.parametrize(
    "sae",
    [
        "topk",
        "jumprelu",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("batchtopk", "matryoshka", "relu", "gated")),
    ],
)
def test_learns_with_every_activation(runs: Runs, sae: str) -> None:
    k = [] if sae in ("topk", "batchtopk", "matryoshka") else ["sae.k=null"]
    out = runs(sae, f"sae={sae}", *k, "sae.expansion=8")
    made = load(out)
    assert isinstance(made, Transcoder)
    assert made.sites == Sites((READS,), (WRITES,))
    assert not made.config.pre_bias
    lines = read_metrics(out)
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    store = Store.open(runs.folder / "store")
    x_TD, y_TD = (store.read_context(site, 0).float() for site in (READS, WRITES))
    error = (made(x_TD).x_hat - y_TD).square().sum() / (y_TD - y_TD.mean(0)).square().sum()
    assert float(error) < 0.6


def test_the_record_says_what_it_reads_and_writes(runs: Runs) -> None:
    found = describe(runs("recorded", "schedule.tokens=160"))
    assert (found.kind, found.widths.d_in, found.widths.d_out) == ("transcoder", 12, 12)
    assert found.provenance["reads"] == [READS]
    assert found.provenance["writes"] == [WRITES]
    assert "hook" not in found.provenance


@pytest.mark.slow  # one with a skip is continued below
def test_stopped_and_continued(runs: Runs) -> None:
    straight = runs("straight")
    runs.stopped("broken", step=50)
    assert_same_run(straight, runs("broken"))


@pytest.mark.slow  # tests/unit/train/test_many.py has one beside an SAE
def test_two_from_one_pass(runs: Runs) -> None:
    alone = runs("one", "sae.k=2")
    runs.together({"a": ["sae.k=2"], "b": ["sae.k=4"]})
    assert_same_run(alone, runs.folder / "a")


def test_on_one_site_it_is_the_sae(runs: Runs) -> None:
    site = "layers.1.resid_post"
    short = "schedule.tokens=640"
    sae = runs("sae", "variant=sae", "reads=null", "writes=null", f"hook={site}", "sae.pre_bias=false", short)
    transcoder = runs("same", f"reads={site}", f"writes={site}", short)
    one, other = load(sae).state_dict(), load(transcoder).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_wrong_words_are_one_line(runs: Runs) -> None:
    with pytest.raises(GranaryError, match=r"variant\.kind=transcodr: choose from sae, transcoder, skip_transcoder"):
        runs("bad", "variant.kind=transcodr")
    with pytest.raises(GranaryError, match="unknown keys skipp"):
        runs("bad", "+variant.skipp=true")
    with pytest.raises(GranaryError, match=r"site layers\.9\.mlp_in is not in the store"):
        runs("bad", "reads=layers.9.mlp_in")
    with pytest.raises(
        GranaryError, match=r"an SAE reads one site and gives it back, not .*: use variant=transcoder for two places"
    ):
        runs("bad", "variant=sae")


def test_with_a_skip(runs: Runs) -> None:
    """What is written here is what is read, all linear. The run says where it began; continued it is the same."""
    words = ("variant=skip_transcoder", "variant.skip_init=ridge", "schedule.tokens=1_000")
    out = runs("skip", *words)
    made = load(out)
    assert isinstance(made, SkipTranscoder)
    assert made.W_skip.any()
    assert describe(out).training["skip_init"] == "ridge"
    assert read_metrics(out)[-1]["fvu"] < 0.05
    runs.stopped("skip-broken", *words, step=30)
    assert_same_run(out, runs("skip-broken", *words))
