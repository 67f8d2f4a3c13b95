"""A MoLT by the configuration's own words: trained, continued, packed, planned; what can't be is one line."""

from collections.abc import Callable

import pytest

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.launch.overrides import expand_shorthands
from shared.sae import MoLT, load
from shared.sae.learn import maps
from shared.sae.sites import Sites
from shared.store import Store
from stage_train.step.trainer import log as trainer_log
from tests.training import Runs, assert_same_run

READS, WRITES = "layers.1.mlp_in", "layers.1.mlp_out"
WORDS = (
    "variant=molt",
    "sae.expansion=null",
    "sae.d_latent=null",
    'variant.ranks="{4:2,2:6}"',
    "sae.k=2",
    "schedule.tokens=2_000",
    "logger.every=20",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_configs: None, planted_store: Callable[..., Store]) -> Runs:
    folder = tmp_path_factory.mktemp("molt")
    planted_store(folder / "store", hooks=(READS, WRITES))
    return Runs(folder, *WORDS, f"reads={READS}", f"writes={WRITES}")


@pytest.mark.parametrize(
    "sae",
    ["batchtopk", "jumprelu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk", "relu", "gated"))],
)
def test_learns_with_every_activation(runs: Runs, sae: str) -> None:
    k = [] if sae in ("topk", "batchtopk") else ["sae.k=null"]
    made = load(out := runs(sae, f"sae={sae}", *k))
    assert isinstance(made, MoLT)
    assert made.sites == Sites((READS,), (WRITES,))
    norms_F = made.transform_norms().detach()
    assert made.config.unit_norm_decoder == (float((norms_F - 1).abs().max()) < 1e-5)
    lines = read_metrics(out)
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    assert 0.999 < lines[-1]["load/effective"] < 8.001
    if made.config.k is not None:  # else nothing may fire in a batch
        assert lines[-1]["load/4"] + lines[-1]["load/2"] == pytest.approx(1, rel=1e-5)


def test_stopped_and_continued(runs: Runs) -> None:
    words = ("optim.ema_decay=0.9", "schedule.tokens=800")
    straight = runs("straight", *words)
    runs.stopped("broken", *words, step=30)
    assert_same_run(straight, runs("broken", *words))


@pytest.mark.slow  # tests/unit/train/test_many.py has SAEs and transcoders from one pass
def test_two_from_one_pass(runs: Runs) -> None:
    alone = runs("one", "sae.k=3")
    runs.together({"a": ["sae.k=3"], "b": ['variant.ranks="{3:4}"']})
    assert_same_run(alone, runs.folder / "a")


def test_collapse_is_told_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(trainer_log, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(maps, "COLLAPSED", 0.1)
    runs("collapsed", 'variant.ranks="{2:9}"', "sae.k=1")
    assert len([line for line in told if "nearly every token turns on the same transforms" in line]) == 1


def test_wrong_words_are_one_line(runs: Runs) -> None:
    with pytest.raises(GranaryError, match="a molt needs its transforms, how many of each rank"):
        runs("bad", "variant.ranks=null")
    with pytest.raises(GranaryError, match="no map from 12 features to 12 has a rank of 64"):
        runs("bad", 'variant.ranks="{64:1,2:3}"')
    for word in ("sae.expansion=8", "sae.d_latent=9"):
        with pytest.raises(GranaryError, match="variant=molt says itself how many latents there are, 8: set"):
            runs("bad", word)
    with pytest.raises(GranaryError, match=r"sae\.prefixes is about rows of the decoder"):
        runs("bad", "sae=matryoshka")
    with pytest.raises(GranaryError, match=r"sae\.expansion=None: must be positive"):
        runs("bad", "variant.kind=transcoder", "~variant.ranks")


def test_ranks_on_a_command_line() -> None:
    assert expand_shorthands(["variant.ranks={16: 1, 8:2}"]) == ['variant.ranks="{16:1,8:2}"']
    assert expand_shorthands(["variant.ranks={4:2},{2:4}"]) == ['variant.ranks="{4:2}","{2:4}"']
    assert expand_shorthands(['variant.ranks="{4:2}"', "variant.ranks=null"]) == [
        'variant.ranks="{4:2}"',
        "variant.ranks=null",
    ]
