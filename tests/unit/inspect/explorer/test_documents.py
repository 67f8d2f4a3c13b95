"""What the pages read says what the folder says."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.latents import Latents
from stage_inspect.explorer.documents import BLOCK, TOP, Documents
from tests.latents import HOSTILE, synthetic_latents


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(
        synthetic_latents(tmp_path_factory.mktemp("documents") / "latents", 80, top=40, sample=30), "made up"
    )


def test_every_token_has_its_piece_and_its_value(documents: Documents) -> None:
    latents = documents.latents
    vocabulary = latents.vocabulary
    assert vocabulary is not None
    page = documents.latent(2)
    examples = latents.top(2)
    for shown, one in zip([*page["groups"][0]["examples"], *documents.more(2)], examples, strict=True):
        assert len(shown["pieces"]) == len(one.tokens)
        assert "".join(shown["pieces"]) == vocabulary.text(one.tokens)
        values = np.zeros(len(one.tokens), np.float32)
        values[shown["at"]] = shown["a"]
        assert np.allclose(values, one.values, rtol=1e-3)
        assert shown["peak"] == one.peak
        assert [one.tokens[offset] for offset in shown.get("special", [])] == [0] * len(shown.get("special", []))
    assert page["groups"][0]["total"] == len(examples) == 40
    assert len(page["groups"][0]["examples"]) == TOP


def test_a_character_of_several_tokens_is_one_piece(documents: Documents) -> None:
    pieces = [piece for shown in documents.more(2) for piece in shown["pieces"]]
    place = next(number for number, piece in enumerate(pieces) if piece.endswith("😀"))
    assert pieces[place + 1] == ""


def test_examples_by_rank_fall(documents: Documents) -> None:
    ranks = documents.latent(2)["groups"][1]["examples"]
    assert [one["value"] for one in ranks] == sorted((one["value"] for one in ranks), reverse=True)
    assert ranks[0]["rank"] == "decile 1 of 10"
    assert ranks[-1]["rank"] == "decile 10 of 10"


def test_a_dead_latent_has_a_page(documents: Documents) -> None:
    page = documents.latent(3)
    assert page["numbers"]["fired"] == 0
    assert page["histogram"] == {"edges": [], "counts": []}
    assert page["groups"][0]["examples"] == []


def test_the_histogram_is_cut_to_what_is_filled(documents: Documents) -> None:
    page = documents.latent(2)
    counts, edges = page["histogram"]["counts"], page["histogram"]["edges"]
    assert len(edges) == len(counts) + 1
    assert sum(counts) == documents.latents.table["fired"][2]
    assert counts[0] > 0
    assert counts[-1] > 0
    assert all(low < high for low, high in pairwise(edges))


def test_names_are_what_was_said_last(documents: Documents) -> None:
    notes = documents.latents.notes
    notes.add_explanation(5, HOSTILE[0], method="default", author="a stranger")
    notes.add_explanation(5, "the second", method="default", author="a stranger")
    notes.set_note(6, "a note\nwith a second line")
    assert documents.names(range(8)) == {5: "the second", 6: "a note"}
    assert documents.rows(0)["5"][0] == "the second"
    assert documents.latent(4)["neighbours"][0][:3] == [5, 1.0, "the second"]
    assert [said["text"] for said in documents.latent(5)["explanations"]] == [HOSTILE[0], "the second"]


def test_concepts_are_those_of_the_newest_search(documents: Documents) -> None:
    notes = documents.latents.notes
    assert documents.concepts() == []
    scores = {"f1": 0.5, "low": 0.4, "high": 0.6, "precision": 0.7, "recall": 0.39, "auroc": 0.98765}
    more = {"auroc_low": 0.91, "auroc_high": 0.99, "chosen_f1": 0.61}
    notes.add_concept("self", "regex self", {"split": "all", "latents": [{"latent": 1, **scores}]})
    notes.add_concept("self", "regex self", {"split": "heldout", "latents": [{"latent": 9, **scores, **more}]})
    notes.add_concept("earlier", "", {"latents": [{"latent": 2, **scores, "chosen_f1": "much"}]})
    strange = [
        {"latent": 80, **scores},
        {"latent": -1, **scores},
        {"latent": 5},
        "five",
        {"latent": 6, **scores, "f1": None},
    ]
    notes.add_concept("a stranger's", HOSTILE[0], {"latents": strange})
    notes.add_concept("nothing", "", {})
    found = documents.concepts()
    assert [(one["name"], len(one["latents"])) for one in found] == [
        ("a stranger's", 0),
        ("earlier", 1),
        ("nothing", 0),
        ("self", 1),
    ]
    assert found[1]["latents"][0][3:] == [0.5, 0.4, 0.6, 0.7, 0.39, 0.9877, None, None, None]
    assert found[3]["split"] == "heldout"
    latent, name, tokens, *rest = found[3]["latents"][0]
    assert (latent, name, len(tokens) > 0) == (9, None, True)
    assert rest == [0.5, 0.4, 0.6, 0.7, 0.39, 0.9877, 0.91, 0.99, 0.61]
    assert documents.meta()["concepts"] == 5


def test_there_are_no_others(documents: Documents) -> None:
    for ask in (
        lambda: documents.rows(80 // BLOCK + 1),
        lambda: documents.column("nothing"),
        lambda: documents.latent(80),
    ):
        with pytest.raises(GranaryError, match="there"):
            ask()


def test_a_folder_without_a_vocabulary_shows_numbers(tmp_path: Path) -> None:
    latents = synthetic_latents(tmp_path)
    for file in sorted((tmp_path / "vocabulary").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    page = Documents(Latents.open(tmp_path), "").latent(1)
    assert latents.num_latents == 12
    assert page["groups"][0]["examples"][0]["pieces"][0].startswith("<token ")


def test_scores_are_shown_with_controls_and_failures(documents: Documents) -> None:
    """What a stranger's details hold in another form is left out; a number names one of the latent's records."""
    notes = documents.latents.notes
    said = notes.add_explanation(8, "a rule", method="rule", author="granary")
    kept = {"kind": "false positive", "tokens": [101, 102], "values": [0, 1.5], "peak": 0, "place": 77}
    strange = [{}, {**kept, "peak": 2}, {**kept, "values": [1]}, {**kept, "tokens": "no"}, "x", -1, 10**6, True]
    control = {"value": 0.25, "low": 0.125, "high": 0.375}
    details = {"precision": 0.5, "recall": "much", "controls": {"shuffled": control, "empty": 3}, "failed": [kept, 0]}
    notes.add_score(said, "rule_f1", 0.75, 0.5, 1.0, {**details, "failed": [kept, 0, *strange]})
    notes.add_score(said, "detection", None, details={"why": "no answer", "controls": [], "failed": {}})
    good, failed = documents.latent(8)["explanations"][-1]["scores"]
    assert [good[name] for name in ("scorer", "value", "low", "high")] == ["rule_f1", 0.75, 0.5, 1.0]
    assert (good["facts"], good["controls"]) == ([["precision", 0.5]], [["shuffled", control]])
    assert [one.get("rank") for one in good["failed"]] == ["false positive", None]
    assert good["failed"][0]["at"] == [1]
    assert (failed["value"], failed["why"], failed["controls"], failed["failed"]) == (None, "no answer", [], [])
    again = Documents(documents.latents, "again")
    assert np.frombuffer(again.column("rule_f1"), "<f4")[[8, 9]].tolist() == pytest.approx([0.75, np.nan], nan_ok=True)
    assert documents.names([8]) == {8: "a rule"}
