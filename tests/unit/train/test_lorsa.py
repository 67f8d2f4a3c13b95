"""A Lorsa by the configuration's own words: trained on whole contexts, continued, packed; what can't be is one line."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.intervene.attach import attach
from shared.sae import Lorsa, SAEConfig, load
from shared.sae.calibrate import Threshold
from shared.sae.formats import WRITABLE
from shared.sae.formats.folded import Folded
from shared.sae.loading import convert
from shared.sae.sites import Sites
from shared.store import Store
from stage_train.job import Job
from stage_train.online.fit import fit
from tests.splicing import prompt, tiny_llama
from tests.training import WORLD, Runs, assert_same_run

READS, WRITES = "layers.1.attn_in", "layers.1.attn_out"
WORDS = (
    "variant=lorsa",
    "variant.attention=plain",
    "variant.qk_init=random",
    "variant.qk_heads=4",
    "variant.qk_width=3",
    "sae.expansion=2",
    "stream.batch_size=64",
    "schedule.tokens=2_000",
    "logger.every=10",
    f"reads={READS}",
    f"writes={WRITES}",
)


@pytest.fixture(scope="module")
def one(runs: Runs) -> Path:
    """The folder of a trained one."""
    return runs("one", "sae.k=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_configs: None, planted_store: Callable[..., Store]) -> Runs:
    folder = tmp_path_factory.mktemp("lorsa")
    planted_store(folder / "store", hooks=(READS, WRITES))
    return Runs(folder, *WORDS)


@pytest.mark.parametrize(
    "sae", ["topk", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batchtopk", "jumprelu"))]
)
def test_learns_with_every_activation(runs: Runs, sae: str) -> None:
    k = [] if sae in ("topk", "batchtopk") else ["sae.k=null"]
    made = load(out := runs(sae, f"sae={sae}", *k))
    assert isinstance(made, Lorsa)
    assert made.sites == Sites((READS,), (WRITES,), "sequence")
    lines = read_metrics(out)
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    if sae == "topk":
        assert 2 < lines[-1]["l0"] <= 3


def test_stopped_and_continued(runs: Runs) -> None:
    words = ("optim.ema_decay=0.9", "optim.micro_batch=40", "schedule.tokens=1_000")
    straight = runs("straight", *words)
    runs.stopped("broken", *words, step=8)
    assert_same_run(straight, runs("broken", *words))


@pytest.mark.slow
def test_two_from_one_pass(runs: Runs) -> None:
    alone = runs("one", "sae.k=2")
    runs.together({"a": ["sae.k=2"], "b": ["variant.qk_heads=2"]})
    assert_same_run(alone, runs.folder / "a")


def test_contexts_whole(runs: Runs, one: Path) -> None:
    """A Lorsa and a dictionary of tokens do not share a stream, and neither takes what the other reads."""
    tokens = Runs(runs.folder).cfg(
        "tokens", "variant=transcoder", f"reads={READS}", f"writes={WRITES}", "stream.batch_size=64"
    )
    with pytest.raises(GranaryError, match=f"{READS} -> {WRITES} is learnt from whole contexts and .* shuffled tokens"):
        Job([runs.cfg("mixed"), tokens], WORLD)
    with pytest.raises(GranaryError, match=r"batch_size=40: this variant learns from whole contexts, of 16 positions"):
        runs("bad", "stream.batch_size=40")
    made = load(one)
    with pytest.raises(GranaryError, match=r"reads whole contexts .* shuffled tokens have lost what came before them"):
        made.encode(torch.zeros(5, 12))


def test_wrong_words_are_one_line(runs: Runs) -> None:
    for words, told in (
        (["variant.attention=own"], "variant.attention=own: choose from model, plain"),
        (["variant.qk_heads=5"], "variant.qk_heads=5: 24 latents do not divide among them"),
        (["variant.qk_heads=null"], "variant.attention=plain needs variant.qk_heads and variant.qk_width"),
        (["variant.qk_init=model"], "variant.attention=plain has no model to begin from"),
        (["variant.attention=model"], "variant.qk_width=3 is for variant.attention=plain"),
        (
            ["variant.attention=model", "variant.qk_width=null", f"reads={WRITES}", f"writes={READS}"],
            "layers.N.attn_in",
        ),
        ([f"writes={READS}"], "a lorsa of layers.1.attn_in to itself would learn to copy it"),
    ):
        with pytest.raises(GranaryError, match=told):
            runs("bad", *words)


def fit_as_a_lorsa(made: Lorsa, folder: Path) -> None:
    saes = attach(tiny_llama(), {READS: SAEConfig(k=3, d_latent=20)})
    fit(saes, [prompt()], tokens=10, overrides=["variant=lorsa"])


REFUSED: dict[str, tuple[Callable[[Lorsa, Path], object], str]] = {
    "attach": (lambda made, _: attach(tiny_llama(), {WRITES: made}), "is attached, not a lorsa: SplicedModel takes"),
    "attach a folder": (lambda _, folder: attach(tiny_llama(), folder), "is a lorsa, no SAE: SplicedModel takes"),
    "attach what is to be trained": (
        lambda made, _: attach(tiny_llama(), {WRITES: made.config}),  # type: ignore[dict-item]
        "is attached, not a LorsaConfig",
    ),
    "fit": (fit_as_a_lorsa, "variant=lorsa is not for fit"),
    "threshold": (
        lambda made, _: Threshold("store").apply("mine", made, {}),
        "mine is a lorsa, which reads whole contexts",
    ),
    **{
        f"converted to {name}": (
            lambda _, folder, name=name: convert(folder, folder.parent / "theirs", name),
            f"the {name} format has no lorsas",
        )
        for name in WRITABLE
    },
    "in a set of circuit-tracer's": (
        lambda made, _: Folded.of(made.config, made.state_dict(), made.places, {}, "circuit_tracer"),
        "the circuit_tracer format has no lorsas: their latents attend to other tokens",
    ),
    "signed_topk": (
        lambda made, _: replace(made.config, activation="signed_topk"),
        "sae.activation=signed_topk is read for linear encoders alone: a lorsa has none",
    ),
    "heads that do not divide": (
        lambda made, _: made.config.check_parts(3),
        "the 4 heads of queries and keys do not divide among parallel.latent=3",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(one: Path, what: str) -> None:
    """And the trained one is what it was."""
    folder = one
    made = load(folder)
    assert isinstance(made, Lorsa)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    work, told = REFUSED[what]
    with pytest.raises(GranaryError, match=re.escape(told)) as raised:
        work(made, folder)
    assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (folder.parent / "theirs").exists()
