"""Exports hold what the folder holds, within the limits of those who read them."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from stage_inspect import explanations
from stage_inspect.export.__main__ import main
from stage_inspect.export.facts import chosen_latents, intervals, linear_histogram, spread
from tests.latents import synthetic_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    found = synthetic_latents(tmp_path_factory.mktemp("export") / "folder", 140)
    said = found.notes.add_explanation(1, "what follows def " * 100, method="rule", author="granary")
    found.notes.add_score(said, "rule_f1", 0.75, 0.5, 0.875, {"precision": 0.5})
    found.notes.add_score(said, "detection", None, details={"why": "no answer"})
    return found


def exported(latents: Latents, folder: Path, kind: str, *arguments: str) -> Path:
    main([latents.url, str(folder / kind), "--to", kind, *arguments])
    return folder / kind


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_linear_bars_hold_what_the_logarithmic_ones_do(latents: Latents) -> None:
    edges = np.array([0, 1, 2, 4, np.inf])
    counts = spread(np.array([4, 2, 8, 6], np.uint64), edges, np.array([0.0, 2.0, 5.0]))
    assert counts.tolist() == [6, 14]
    centres, bars = linear_histogram(latents, 1)
    assert bars.sum() == latents.table["fired"][1]
    assert len(centres) == 50
    assert len(linear_histogram(latents, 3)[0]) == 0
    parts = intervals(latents, 1, 3)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.low < one.value <= part.high for part in parts for one in part.examples)


def test_which_latents(latents: Latents) -> None:
    assert chosen_latents("5:7", latents) == [5, 6]
    assert chosen_latents("7,3", latents) == [7, 3]
    assert len(chosen_latents(None, latents)) == 140
    for text in ("x", "9:9", "140", "1:2:3"):
        with pytest.raises(GranaryError, match="--latents"):
            chosen_latents(text, latents)


def test_saedashboard(latents: Latents, tmp_path: Path) -> None:
    folder = exported(latents, tmp_path, "saedashboard", "--model-id", "m", "--source", "2-set")
    first, second = (json.loads((folder / f"batch-{number}.json").read_text()) for number in (0, 1))
    assert (first["layer"], first["sae_set"], len(first["features"]), len(second["features"])) == (2, "set", 128, 11)
    assert json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"] == [3]
    one = next(feature for feature in first["features"] if feature["feature_index"] == 1)
    top = latents.top(1, 20)
    assert [row["values"] for row in one["activations"][: len(top)]] == [
        pytest.approx(example.values.tolist(), rel=1e-5) for example in top
    ]
    for row in one["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert all(row["tokens"])
        assert row["values"][row["qualifying_token_index"]] == max(row["values"])
    assert one["frac_nonzero"] == latents.table["density"][1]
    assert sum(one["freq_hist_data_bar_heights"]) == latents.table["fired"][1]


def test_neuronpedia(latents: Latents, tmp_path: Path) -> None:
    home = exported(latents, tmp_path, "neuronpedia", "--model-id", "M-1", "--source", "2-Set") / "m-1" / "2-set"
    assert {path.name for path in home.iterdir()} == {
        "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "features", "activations", "explanations",
        "explanation_scores", "upload",
    }  # fmt: skip
    features = read_lines(home / "features" / "0.jsonl.gz")
    assert [row["index"] for row in features[:4]] == ["0", "1", "2", "4"]
    activations = read_lines(home / "activations" / "0.jsonl.gz")
    ids = [row["id"] for row in activations]
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 25 and one.startswith("c") for one in ids)
    assert all(row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]] for row in activations)
    told = read_lines(home / "explanations" / "0.jsonl.gz")
    assert [row["index"] for row in told] == ["1"]
    for path in sorted((home / "upload").iterdir()):
        check_upload(json.loads(path.read_text()))


def check_upload(payload: dict[str, Any]) -> None:
    """The limits that the web upload answers with 400."""
    assert payload["modelId"] == payload["modelId"].lower()
    assert payload["source"] == payload["source"].lower()
    assert 1 <= len(payload["features"]) <= 128
    indices = [one["index"] for one in payload["features"]]
    assert len(set(indices)) == len(indices)
    for one in payload["features"]:
        assert 0 <= one["index"] <= 10_000_000
        assert 0 <= one["density"] <= 1
        assert max(len(one["topLogits"]), len(one["bottomLogits"])) <= 20
        assert all(logit["token"] for logit in one["topLogits"] + one["bottomLogits"])
        assert all(1 <= len(told["text"]) <= 512 for told in one["explanations"])
        assert one["activations"]
        for row in one["activations"]:
            assert 1 <= len(row["tokens"]) == len(row["values"]) <= 1024
            assert all(row["tokens"])
            assert 0 <= row["quantileFraction"] <= 1
            assert max(row["quantileMin"], row["quantileMax"]) <= 99_999_999


def test_delphi(latents: Latents, tmp_path: Path) -> None:
    folder = exported(latents, tmp_path, "delphi", "--latents", "0:5") / "latents" / "layers.2.resid_post"
    assert json.loads((folder / "config.json").read_text())["cache_ctx_len"] == 32
    told = sorted((tmp_path / "delphi" / "explanations").iterdir())
    assert [path.name for path in told] == ["layers.2.resid_post_latent1.txt"]
    assert json.loads(told[0].read_text()).startswith("what follows def")
    tensors = load_file(folder / "0_139.safetensors")
    locations, tokens = tensors["locations"], tensors["tokens"]
    assert set(np.unique(locations[:, 2])) == {0, 1, 2, 4}
    strongest = latents.top(1)[0]
    mine = locations[:, 2] == 1
    row = locations[mine][0, 0]
    there = locations[mine & (locations[:, 0] == row)]
    assert tokens[row, : len(strongest.tokens)].tolist() == strongest.tokens.tolist()
    assert there[:, 1].tolist() == np.flatnonzero(strongest.values).tolist()
    values = tensors["activations"][mine & (locations[:, 0] == row)]
    assert np.allclose(values, strongest.values[strongest.values != 0], rtol=1e-3)


def test_delphi_has_the_rows_of_all_latents_in_one_file(tmp_path: Path) -> None:
    """Its loader takes the tokens of the first file for those of every latent."""
    many = synthetic_latents(tmp_path / "many", 600)
    folder = exported(many, tmp_path, "delphi") / "latents" / "layers.2.resid_post"
    (file,) = folder.glob("*.safetensors")
    assert file.stem == "0_599"
    tensors = load_file(file)
    mine = tensors["locations"][tensors["locations"][:, 2] == 590]
    strongest = many.top(590)[0]
    assert tensors["tokens"][mine[0, 0], : len(strongest.tokens)].tolist() == strongest.tokens.tolist()


def test_delphi_fp16_inf(latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float16 can't hold is its largest number, not infinite."""
    true = latents.top(1)[0].value
    examples = Latents.examples

    def strong(self: Latents, records: Any) -> list[Any]:
        return [replace(one, values=one.values * (70_000 / true)) for one in examples(self, records)]

    monkeypatch.setattr(Latents, "examples", strong)
    folder = exported(latents, tmp_path, "delphi", "--latents", "1:2") / "latents" / "layers.2.resid_post"
    values = load_file(next(folder.glob("*.safetensors")))["activations"]
    assert np.isfinite(values).all()
    assert values.max() == np.finfo(np.float16).max


def test_parquet(latents: Latents, tmp_path: Path) -> None:
    folder = exported(latents, tmp_path, "parquet")
    table = pq.read_table(folder / "latents.parquet")
    assert table["fired"].to_pylist() == latents.table["fired"].tolist()
    examples = pq.read_table(folder / "examples.parquet", filters=[("latent", "=", 2), ("kind", "=", "top")])
    assert examples["value"].to_pylist() == [one.value for one in latents.top(2)]
    assert examples["tokens"].to_pylist() == [one.tokens.tolist() for one in latents.top(2)]
    related = pq.read_table(folder / "related.parquet", filters=[("latent", "=", 2), ("kind", "=", "cosine")])
    assert related["other"].to_pylist() == [one.latent for one in latents.neighbours(2)]


def test_wrong_exports_are_told(latents: Latents, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for arguments, told in (
        (["full", "--to", "parquet"], "is there and not empty"),
        (["new", "--to", "neuronpedia", "--source", "nothing"], "write LAYER-SET"),
        (["newer", "--to", "delphi", "--latents", "3"], "none of these latents ever fires"),
    ):
        with pytest.raises(SystemExit):
            main([latents.url, str(tmp_path / arguments[0]), *arguments[1:]])
        assert told in capsys.readouterr().err


def test_explanations_come_back(latents: Latents, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = exported(latents, tmp_path, "neuronpedia", "--latents", "0:4", "--source", "2-set") / "bundled" / "2-set"
    there = home / "explanations" / "0.jsonl.gz"
    mine = synthetic_latents(tmp_path / "mine", 12)
    for expected in ("1 explanations taken", "0 explanations taken"):
        explanations.main([mine.url, str(there)])
        assert expected in capsys.readouterr().out
    assert mine.notes.explanations(1)[0].text.startswith("what follows def")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"index": 2, "description": "x"}, {"index": 99, "description": "y"}]))
    with pytest.raises(SystemExit):
        explanations.main([mine.url, str(listed)])
    assert "explanation 2 is of latent 99" in capsys.readouterr().err
    assert not mine.notes.explanations(2)


def test_scores_go_with_their_explanations(latents: Latents, tmp_path: Path) -> None:
    """A failed score is empty where a format knows that, and left out where it doesn't; it is never 0."""
    home = exported(latents, tmp_path, "neuronpedia", "--source", "2-granary-res", "--latents", "0:3")
    (said,) = read_lines(next(home.rglob("explanations/0.jsonl.gz")))
    (score,) = read_lines(next(home.rglob("explanation_scores/0.jsonl.gz")))
    assert score["explanationId"] == said["id"] != score["id"]
    assert (score["value"], score["explanationScoreTypeName"]) == (0.75, "rule_f1")
    assert json.loads(score["jsonDetails"]) == {"low": 0.5, "high": 0.875, "precision": 0.5}
    rows = pq.read_table(
        exported(latents, tmp_path, "parquet", "--latents", "0:3") / "explanations.parquet"
    ).to_pylist()
    assert [(one["latent"], one["scorer"], one["value"]) for one in rows] == [
        (1, "rule_f1", 0.75),
        (1, "detection", None),
    ]
    (file,) = (exported(latents, tmp_path, "delphi", "--latents", "0:3") / "explanations").iterdir()
    assert file.name.endswith("_latent1.txt")
    assert json.loads(file.read_text()).startswith("what follows def")


def test_names_of_neuronpedia_and_the_model_that_judged(tmp_path: Path) -> None:
    mine = synthetic_latents(tmp_path / "mine", 3)
    said = mine.notes.add_explanation(1, "x", method="default", author="who explained")
    for name in ("detection", "fuzzing", "embedding", "surprisal"):
        mine.notes.add_score(said, name, 0.75, details={"judge": "who judged"})
    home = exported(mine, tmp_path, "neuronpedia", "--source", "2-granary-res")
    rows = read_lines(next(home.rglob("explanation_scores/0.jsonl.gz")))
    kinds = ["eleuther_recall", "eleuther_fuzz", "eleuther_embedding", "surprisal"]
    assert sorted(row["explanationScoreTypeName"] for row in rows) == sorted(kinds)
    assert {row["explanationScoreModelName"] for row in rows} == {"who judged"}


def results(folder: Path, hookpoint: str, latent: int, text: Any, rows: Any = None) -> Path:
    """A folder of delphi's results."""
    for kind, content in (("explanations", text), ("scores/fuzz", rows)):
        if content is not None:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{hookpoint}_latent{latent}.txt").write_text(json.dumps(content))
    return folder


def test_delphi_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 active 3 are right, of 2 silent 1; one answer was not read and is no zero."""
    mine = synthetic_latents(tmp_path / "mine", 4)
    told = [(True, True)] * 3 + [(True, False), (False, True), (False, False), (False, None)]
    rows = [{"activating": truth, "prediction": said, "probability": None} for truth, said in told]
    folder = results(tmp_path / "delphi", "layers.2", 1, " what it does ", rows)
    for expected in ("1 explanations taken", "0 explanations taken"):
        explanations.main([mine.url, str(folder)])
        assert expected in capsys.readouterr().out
    (said,) = mine.notes.explanations(1)
    assert (said.text, said.method, said.author) == ("what it does", "delphi", "unknown")
    (score,) = mine.notes.scores(said.id)
    assert (score.scorer, score.value) == ("fuzzing", (3 / 4 + 1 / 2) / 2)
    assert score.low < score.value < score.high
    assert score.details["counts"] == {"active": 4, "silent": 3, "unread": 1}
    results(folder, "layers.3", 2, "another")
    explanations.main([mine.url, str(folder), "--hookpoint", "layers.3"])
    assert [one.text for one in mine.notes.explanations(2)] == ["another"]
    assert mine.notes.explanations(1) == [said]


def test_wrong_results_of_delphi_are_told_and_nothing_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = synthetic_latents(tmp_path / "mine", 4)
    two = results(results(tmp_path / "two", "layers.2", 1, "x"), "layers.3", 1, "x")
    (tmp_path / "empty").mkdir()
    for folder, more, expected in (
        (two, [], "layers.2, layers.3: choose with --hookpoint"),
        (two, ["--hookpoint", "layers.9"], "no explanations of --hookpoint layers.9"),
        (tmp_path / "empty", [], "no explanations that delphi wrote"),
        (results(tmp_path / "far", "l", 4, "x"), [], "there are 4 latents"),
        (results(tmp_path / "form", "l", 1, {"x": 1}), [], "l_latent1.txt"),
        (results(tmp_path / "rows", "l", 1, "x", [{"activating": 1}]), [], "example 1 has no activating"),
        (results(tmp_path / "list", "l", 1, "x", {"a": 1}), [], "l_latent1.txt"),
    ):
        with pytest.raises(SystemExit):
            explanations.main([mine.url, str(folder), *more])
        assert expected in capsys.readouterr().err
    assert not mine.notes.explanations()
