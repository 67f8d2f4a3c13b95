"""Explanations, notes, labels, lists, and the search over them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.latents.notes import Notes


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "folder" / "notes.sqlite", writable=True)


def test_reading_makes_no_file(notes: Notes) -> None:
    assert notes.search("anything") == notes.explanations(3) == []
    assert not notes.path.exists()


def test_explanations_scores_and_search(notes: Notes) -> None:
    one, two = notes.add_explanations(
        [(5, "names after def", "rule", "granary", {"f1": 0.9}), (6, "closing ) of calls", "person", "me", {})]
    )
    notes.add_score(one, "detection", 0.8, 0.7, 0.9)
    notes.add_score(one, "fuzz", None, details={"error": "429"})
    assert [(score.scorer, score.value) for score in notes.scores(one)] == [("detection", 0.8), ("fuzz", None)]
    assert notes.explanations(5)[0].details == {"f1": 0.9}
    assert [found.latent for found in notes.search("NAMES def")] == [5]
    assert [found.latent for found in notes.search(")")] == [6]
    assert [found.latent for found in notes.search("of call")] == [6]
    assert notes.search('" OR text:x %') == notes.search("") == []
    notes.remove_explanation(two)
    notes.remove_explanation(one)
    assert notes.search("names") == notes.scores(one) == []


def test_matching_finds_what_search_finds(notes: Notes) -> None:
    notes.add_explanations(
        [(latent, f"all of {'even' if latent % 2 == 0 else 'odd'} at 5%", "rule", "", {}) for latent in range(9)]
    )
    notes.add_explanation(4, "even again", method="rule", author="")
    notes.set_note(7, "a note, even so")
    for text in ("even", "odd 5%", "of", "even of", "nowhere", "", 'a "note"', "%"):
        found = notes.matching(text)
        assert sorted(found) == sorted({hit.latent for hit in notes.search(text, 1000)}), text
    assert sorted(notes.matching("even")) == [0, 2, 4, 6, 7, 8]


def test_what_a_person_writes(notes: Notes) -> None:
    notes.set_note(2, "looks like indentation")
    notes.set_note(2, "surely indentation")
    assert notes.note(2) == "surely indentation"
    assert [(found.latent, found.kind) for found in notes.search("indent")] == [(2, "note")]
    notes.set_note(2, "")
    assert notes.note(2) == ""
    assert notes.search("indent") == []
    notes.set_labels(2, ["b", "a", "b"])
    assert notes.labels() == {2: ["a", "b"]}
    notes.set_list("mine", [9, 2, 9])
    assert notes.lists() == {"mine": [9, 2]}
    notes.set_list("mine", None)
    assert notes.lists() == {}


def test_concepts_and_answers(notes: Notes) -> None:
    notes.add_concept("self", "regex self", {"best": 3})
    assert notes.concepts()[0]["result"] == {"best": 3}
    assert notes.answer("abc") is None
    notes.keep_answer("abc", "yes")
    assert notes.answer("abc") == "yes"


def test_a_copy_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(GranaryError, match="can't be changed"):
        Notes(tmp_path / "notes.sqlite", writable=False).set_note(1, "x")
    (tmp_path / "notes.sqlite").write_bytes(b"no database at all, but long enough to look like a file of one" * 20)
    with pytest.raises(GranaryError, match="can't be read"):
        Notes(tmp_path / "notes.sqlite", writable=True).note(1)


def test_what_cannot_be_opened_is_one_line_and_leaves_nothing_to_close(notes: Notes) -> None:
    notes.path.mkdir(parents=True)
    with pytest.raises(GranaryError, match=r"can't be read \(unable to open"):
        notes.search("anything")


def test_a_thread_closes_its_own_connection_with_its_end(notes: Notes) -> None:
    notes.set_note(3, "said")
    here = open_files(notes.path)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(notes.note, [3] * 9)) == ["said"] * 9
    assert open_files(notes.path) == here == 1
    del notes._local.held
    assert open_files(notes.path) == 0


def open_files(path: Path) -> int:
    """Descriptors of this process on the file."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += descriptor.readlink() == path
    return found


def test_a_first_writer_that_was_stopped_leaves_no_notes(notes: Notes) -> None:
    """A full disk, or a kill, before the first table: SQLite leaves an empty file."""
    notes.path.parent.mkdir(parents=True)
    notes.path.touch()
    assert notes.note(1) == ""
    notes.set_note(1, "mine")
    assert Notes(notes.path, writable=True).note(1) == "mine"


def test_a_disk_that_is_full_is_one_line(notes: Notes) -> None:
    notes.set_note(1, "before")
    db = notes._connection()
    assert db is not None
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(GranaryError, match=r"notes\.sqlite can't be written \(database or disk is full\)"):
        notes.set_note(1, "much " * 100_000)
    assert Notes(notes.path, writable=True).note(1) == "before"


@pytest.mark.parametrize(
    ("value", "low", "controls", "is_name"),
    [
        (0.9, 0.8, {"empty": {"value": 0.1, "low": 0.0, "high": 0.2}}, True),
        (0.65, 0.6, {"empty": {"value": 0.65, "low": 0.6, "high": 0.7}}, False),  # "any token" of a dense latent
        (0.65, 0.6, {"shuffled": {"value": 0.1, "low": 0, "high": 0.2}, "empty": {"value": 0.6, "high": 0.61}}, False),
        (0.4, 0.3, {}, False),
        (None, None, {}, False),
        (0.9, None, "of another kind", True),
    ],
)
def test_a_rule_is_a_name_where_it_beats_its_controls(
    notes: Notes, value: float | None, low: float | None, controls: object, is_name: bool
) -> None:
    rule = notes.add_explanation(3, "token is 'a'", method="rule", author="granary")
    notes.add_score(rule, "rule_f1", value, low, 1.0, {"controls": controls})
    assert (notes.name(3) == "token is 'a'") == is_name
