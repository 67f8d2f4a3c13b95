"""Supervised scores through the command line, on made-up Python whose labels the activations hold."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from shared.basics.config import Split
from shared.basics.errors import GranaryError
from shared.latents.vocabulary import Vocabulary
from shared.lm.token_bytes import token_bytes
from shared.lm.tokenizer import load_tokenizer, special_ids
from shared.parallel import World
from shared.sae.sites import Sites
from shared.store import Store
from shared.text.beginnings import Beginnings
from shared.text.documents import documents
from stage_eval.evaluate import check_settings
from stage_eval.measure.data import load_data
from stage_eval.measure.session import PassSettings, Session
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.schema import FILE
from stage_eval.supervised.gather import gather
from stage_eval.supervised.labels import BITS, CONCEPTS, KINDS
from stage_eval.supervised.sample import draw, side
from tests.cli import ForkServer
from tests.pipeline.test_eval import fails, read_report, run
from tests.python_store import HOOK, T, label_sae, python_store, source

SOURCES = 40
PROSE = "Once upon a time there was a stone by the river, and it's there if none was in it. "
SETTINGS = ("downstream=false", "split=all", "supervised=true", "supervised_examples=200")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store, with one of its documents twice and one that is no Python, and dictionaries of the same latents."""
    folder = tmp_path_factory.mktemp("supervised")
    python_store(folder / "store", [*map(source, range(SOURCES)), PROSE * 9, source(0)])
    label_sae(folder / "sae")
    label_sae(folder / "saes" / "one")
    label_sae(folder / "saes" / "two", first=3)
    return folder


def arguments(study: Path, out: Path, *more: str) -> list[str]:
    return [f"run_dir={out}", f"out_dir={out}", f"sae={study / 'sae'}", f"store.url={study / 'store'}", *more]


@pytest.fixture(scope="module")
def report(study: Path) -> dict[str, Any]:
    done = run(*arguments(study, study / "out", *SETTINGS))
    assert done.returncode == 0, done.stderr
    assert "labels of Python's tokenizer" in done.stdout
    return read_report(study / "out")


def test_latents_that_are_the_labels_score_as_such(report: dict[str, Any], study: Path) -> None:
    found = report["supervised"]
    assert found["left_out"] == {}
    assert (sum(found["documents"]), found["seed"], found["most"]) == (SOURCES, 0, 200)
    assert [one["concept"] for one in found["concepts"]] == list(CONCEPTS)
    for one in found["concepts"]:
        assert one["best"][0] == BITS[one["concept"]]
        assert one["main"] == [BITS[one["concept"]]]
        assert one["split"] == {"value": 1, "interval": [1, 1]}
        assert one["probes"]["latents"]["1"]["value"] == 1
        assert one["probes"]["activation"]["value"] > 0.99
        assert one["absorption"]["full"]["value"] == 0
    assert found["probes"]["token"]["value"] < 0.9
    assert found["probes"]["token"]["interval"][0] < found["probes"]["token"]["value"]
    assert [one["kind"] for one in found["perturbation"]["kinds"]] == list(KINDS)
    place = found["perturbation"]["ablated"].index(2)
    assert found["perturbation"]["score"][place]["value"] > 0.35
    assert abs(found["perturbation"]["random"][place]["value"]) < 0.1
    assert len(found["removal"]["pairs"]) == 3
    jsonschema.validate(report, json.loads(FILE.read_text()))
    assert Evaluation.from_json(report).to_json() == report
    page = (study / "out" / "report.html").read_text()
    assert "Labels of Python" in page
    assert "Sparse probing" in page
    plots = {path.stem for path in (study / "out" / "plots").iterdir()}
    assert {"labels_probing", "labels_absorption", "labels_perturbation", "labels_removal"} <= plots


def test_all_else_is_as_without_them(report: dict[str, Any], study: Path) -> None:
    out = study / "without"
    done = run(*arguments(study, out, *SETTINGS[:2]))
    assert done.returncode == 0, done.stderr
    without = read_report(out)
    kept = {key: value for key, value in report.items() if key not in ("supervised", "created")}
    assert {key: value for key, value in without.items() if key != "created"} == kept
    assert "Labels of Python" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_give_the_same_figures(
    stages: ForkServer, report: dict[str, Any], study: Path, tmp_path: Path
) -> None:
    for rank in stages.at(tmp_path).ranks(2, "stage_eval", "device.name=cpu", *arguments(study, tmp_path, *SETTINGS)):
        assert rank.code == 0, rank.stderr
    assert read_report(tmp_path)["supervised"] == report["supervised"]


@pytest.mark.slow  # each is scored as alone; tests/pipeline/test_eval_folders.py compares several
def test_several_are_compared(report: dict[str, Any], study: Path) -> None:
    out = study / "comparison"
    done = run(f"run_dir={out}", f"sae={study / 'saes'}", f"store.url={study / 'store'}", "sae.per_pass=1", *SETTINGS)
    assert done.returncode == 0, done.stderr
    comparison = json.loads((out / "comparison.json").read_text())
    for row in comparison["rows"]:
        assert row["supervised"]["latents_1"] == report["supervised"]["probes"]["latents"]["1"]
        assert row["supervised"]["ablated"] == 20
        assert row["supervised"]["removal"] == report["supervised"]["removal"]["score"][3]
    assert "Labels of Python" in (out / "comparison.html").read_text()
    assert (out / "plots" / "labels_latents_1.png").is_file()
    two = read_report(study / "saes" / "two")["supervised"]["concepts"]
    assert [one["best"][0] for one in two] == [(BITS[name] + 3) % len(BITS) for name in CONCEPTS]


def test_a_wrong_input_is_one_line(study: Path, tmp_path: Path) -> None:
    few = fails(*arguments(study, tmp_path, *SETTINGS[:3], "contexts=1"))
    assert "none of its tasks has 20 tokens" in few
    assert fails(*arguments(study, tmp_path, *SETTINGS[:3], "supervised_examples=5")).endswith("at least 20")
    python_store(tmp_path / "prose", [PROSE * 9] * 4)
    label_sae(tmp_path / "sae")
    told = fails(f"run_dir={tmp_path}", f"store.url={tmp_path / 'prose'}", *SETTINGS)
    assert "is not Python" in told
    assert "supervised" in told


def test_the_draw_is_a_function_of_the_seed_and_the_text(study: Path) -> None:
    store = Store.open(study / "store")
    tokenizer = load_tokenizer("bundled")
    vocabulary = Vocabulary.of(token_bytes(tokenizer), special_ids(tokenizer).all)
    data = load_data(store, Split.all, None)
    sample = draw(store, data, vocabulary, 0, 50)
    place = data.contexts[sample.context_N] * T + sample.position_N
    assert (np.diff(place) > 0).all()
    assert (store.tokens(data.contexts).reshape(-1)[place] == sample.token_N).all()
    assert store.mask(data.contexts).reshape(-1)[place].all()
    # Never the prose, whose words Python has too.
    texts = {at: one.text for one in documents(store, np.arange(store.num_contexts), vocabulary) for at in one.places}
    assert not any("Once upon" in texts[at] for at in place)
    # Halves: by a walk over all documents, and never one document in both.
    beginnings, half, head_of = Beginnings(store), {}, {}
    for document in documents(store, np.arange(store.num_contexts), vocabulary):
        head = beginnings.head(document)
        half |= dict.fromkeys(document.places.tolist(), side(0, head))
        head_of |= dict.fromkeys(document.places.tolist(), head)
    assert [half[one] for one in place.tolist()] == sample.is_test_N.astype(int).tolist()
    for is_test in (False, True):
        numbers: dict[bytes, set[int]] = {}
        rows = np.flatnonzero(sample.is_test_N == is_test)
        for one, number in zip(place[rows], sample.document_N[rows], strict=True):
            numbers.setdefault(head_of[int(one)], set()).add(int(number))
        assert all(len(of) == 1 for of in numbers.values())
        assert len(numbers) == sample.documents[is_test]
    # Groups: what they say they are, at most so many, and in each half.
    for task in sample.tasks.values():
        for number in range(len(task.groups)):
            for is_test in (False, True):
                assert 20 <= ((task.group_N == number) & (sample.is_test_N == is_test)).sum() <= 50
    # Fewer of them are the first of more: a figure on more tokens keeps those that it has.
    fewer = draw(store, data, vocabulary, 0, 30)
    assert set(zip(fewer.context_N, fewer.position_N, strict=True)) <= set(
        zip(sample.context_N, sample.position_N, strict=True)
    )
    # What two processes read adds up to what one reads: each row is one process's.
    settings, statistics = PassSettings(3, splice_bos=False, joint=False), {HOOK: store.statistics(HOOK)}
    worlds = [World(rank, size, 0, torch.device("cpu")) for rank, size in ((0, 1), (0, 2), (1, 2))]
    whole, *parts = (
        gather(sample, [HOOK], Session(world, store, data, statistics, settings))[HOOK] for world in worlds
    )
    assert torch.equal(whole, sum(parts))
    assert all((part != 0).any(1).sum() > 20 for part in parts)
    for number in (0, 7, len(sample) - 1):
        context = int(data.contexts[sample.context_N[number]])
        assert torch.equal(whole[number], store.read_context(HOOK, context)[int(sample.position_N[number])])
    other = draw(store, data, vocabulary, 1, 50)
    assert other.documents != sample.documents or (other.token_N[:50] != sample.token_N[:50]).any()


def test_dictionaries_of_sequences_are_refused() -> None:
    folder = SimpleNamespace(path="here", sites=Sites((HOOK,), (HOOK,), unit="sequence"))
    settings = SimpleNamespace(supervised=True, joint=False, batch_contexts=None, sae=SimpleNamespace(per_pass=1))
    with pytest.raises(GranaryError, match="here reads whole sequences"):
        check_settings(settings, [folder])  # type: ignore[arg-type, list-item]
