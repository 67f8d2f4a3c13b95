"""``notes.sqlite``: explanations, scores, notes, labels, lists, and the search over them.

A file on this machine is opened for writing when something is written first; one at a URL is read from a copy.
"""

import json
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from shared.basics.disk import telling_disk_errors
from shared.basics.documents import parse_json, typed
from shared.basics.errors import GranaryError
from shared.latents.layout import NOTES
from shared.store.io.base import ObjectIO
from shared.store.io.local import LocalIO

VERSION = 1
RULE = "rule"  # the method of explanations that are exact predicates
NAMING = 0.5  # the F1 from which on a rule is a name
SHORTEST = 3  # letters of a term that the trigram index can find


@dataclass(frozen=True, slots=True)
class Explanation:
    """What someone says a latent does."""

    id: int
    latent: int
    text: str
    method: str
    """How it was found: ``rule``, ``person``, the name of a prompt ..."""
    author: str
    """A language model's name, or a person's."""
    created: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """How well an explanation holds; value None where that could not be computed."""

    explanation: int
    scorer: str
    value: float | None
    low: float | None
    high: float | None
    created: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Made:
    """An explanation with its scores, before it is written."""

    latent: int
    text: str
    details: dict[str, Any]
    scores: tuple[tuple[str, float | None, float | None, float | None, dict[str, Any]], ...]
    """(scorer, value, low, high, details) of each."""

    def is_kept(self, there: Explanation, scores: Sequence[Score]) -> bool:
        """Whether it is there already, and its scores."""
        found = tuple((one.scorer, one.value, one.low, one.high, one.details) for one in scores)
        return (there.text, there.details, found) == (self.text, self.details, self.scores)


@dataclass(frozen=True, slots=True)
class Found:
    """A hit of a search."""

    latent: int
    text: str
    kind: str
    """``explanation`` or ``note``."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A thread's connection, closed once nothing holds this; alone it is in a cycle, and waits for the collector."""

    db: sqlite3.Connection

    def __post_init__(self) -> None:
        weakref.finalize(self, self.db.close)


class Notes:
    """The notes of one latents folder. Safe to use from several threads; each call is a transaction."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path, self.writable = path, writable
        self._local = threading.local()

    @classmethod
    def open(cls, io: ObjectIO) -> "Notes":
        """Those of a folder; where it has none yet, they are empty. A copy goes when these notes do."""
        if isinstance(io, LocalIO):
            return cls(io.root / NOTES, writable=True)
        folder = Path(tempfile.mkdtemp(prefix="granary-notes-"))
        notes = cls(folder / NOTES, writable=False)
        weakref.finalize(notes, shutil.rmtree, folder, ignore_errors=True)
        if io.size(NOTES) is not None:
            notes.path.write_bytes(io.get(NOTES))
        return notes

    # Explanations and scores

    def add_explanation(
        self, latent: int, text: str, *, method: str, author: str, details: dict[str, Any] | None = None
    ) -> int:
        """Add one and return its id."""
        return self.add_explanations([(latent, text, method, author, details or {})])[0]

    def add_explanations(self, rows: Sequence[tuple[int, str, str, str, dict[str, Any]]]) -> list[int]:
        """Add many of (latent, text, method, author, details) at once; returns their ids."""
        time = now()
        added = []
        with self._writing() as db:
            for latent, text, method, author, details in rows:
                number = db.execute(
                    "INSERT INTO explanation(latent, text, method, author, created, details) VALUES (?, ?, ?, ?, ?, ?)",
                    (latent, text, method, author, time, json.dumps(details)),
                ).lastrowid
                assert number is not None
                _index(db, 2 * number, "explanation", latent, text)
                added.append(number)
        return added

    def remove_explanation(self, explanation: int) -> None:
        """Remove one with its scores."""
        with self._writing() as db:
            db.execute("DELETE FROM explanation WHERE id = ?", (explanation,))
            _index(db, 2 * explanation, "explanation", 0, "")

    def replace_explanations(self, method: str, author: str, latents: Sequence[int], made: Sequence[Made]) -> int:
        """Put these, with their scores, in the place of all that a method and author said of these latents.

        One transaction. What is there already, scores and all, stays as it is; returns how many were written.
        """
        there: dict[int, list[Explanation]] = {}
        for one in self.explanations():
            if (one.method, one.author) == (method, author):
                there.setdefault(one.latent, []).append(one)
        wanted = {one.latent: one for one in made}
        stale: list[Explanation] = []
        for latent in latents:
            found = there.get(latent, [])
            if len(found) == 1 and latent in wanted and wanted[latent].is_kept(found[0], self.scores(found[0].id)):
                del wanted[latent]
            else:
                stale += found
        if not stale and not wanted:
            return 0
        time = now()
        with self._writing() as db:
            for old in stale:
                db.execute("DELETE FROM explanation WHERE id = ?", (old.id,))
                _index(db, 2 * old.id, "explanation", 0, "")
            for new in wanted.values():
                number = db.execute(
                    "INSERT INTO explanation(latent, text, method, author, created, details) VALUES (?, ?, ?, ?, ?, ?)",
                    (new.latent, new.text, method, author, time, json.dumps(new.details)),
                ).lastrowid
                assert number is not None
                _index(db, 2 * number, "explanation", new.latent, new.text)
                for scorer, value, low, high, details in new.scores:
                    db.execute(
                        "INSERT INTO score(explanation, scorer, value, low, high, created, details)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (number, scorer, value, low, high, time, json.dumps(details)),
                    )
        return len(wanted)

    def best_scores(self, scorer: str) -> dict[int, float]:
        """The largest value of this scorer by latent; latents without one are left out."""
        rows = self._read(
            "SELECT latent, max(value) FROM explanation JOIN score ON explanation.id = score.explanation"
            " WHERE scorer = ? AND value IS NOT NULL GROUP BY latent",
            (scorer,),
        )
        return {latent: value for latent, value in rows if isinstance(value, float)}

    def explanations(self, latent: int | None = None) -> list[Explanation]:
        """Those of a latent, or all; the oldest first."""
        where, values = ("WHERE latent = ?", (latent,)) if latent is not None else ("", ())
        rows = self._read(f"SELECT id, latent, text, method, author, created, details FROM explanation {where}", values)
        return [
            Explanation(number, of, text, method, author, created, self._details(details))
            for number, of, text, method, author, created, details in rows
        ]

    def add_score(
        self,
        explanation: int,
        scorer: str,
        value: float | None,
        low: float | None = None,
        high: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Add a score of an explanation, with the ends of its 95 % interval."""
        columns = "explanation, scorer, value, low, high, created, details"
        values = (explanation, scorer, value, low, high, now(), json.dumps(details or {}))
        with self._writing() as db:
            db.execute(f"INSERT INTO score({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def scores(self, explanation: int) -> list[Score]:
        """Scores of an explanation; the oldest first."""
        columns = "explanation, scorer, value, low, high, created, details"
        rows = self._read(f"SELECT {columns} FROM score WHERE explanation = ? ORDER BY id", (explanation,))
        return [
            Score(of, scorer, value, low, high, created, self._details(details))
            for of, scorer, value, low, high, created, details in rows
        ]

    # What a person writes

    def note(self, latent: int) -> str:
        """The note on a latent, empty where there is none."""
        rows = self._read("SELECT text FROM note WHERE latent = ?", (latent,))
        return str(rows[0][0]) if rows else ""

    def name(self, latent: int) -> str | None:
        """The first line of what a person noted on a latent, or its newest explanation; None where there is neither.

        A rule is no name while something else is said; nor is one of an F1 below `NAMING`, or whose interval meets that
        of a control, as "any token" does of a latent that fires nearly everywhere.
        """
        if note := self.note(latent):
            return note.split("\n")[0]
        said = self.explanations(latent)
        if others := [one for one in said if one.method != RULE]:
            return others[-1].text
        return said[-1].text if said and any(map(_is_good, self.scores(said[-1].id))) else None

    def set_note(self, latent: int, text: str) -> None:
        """Write the note on a latent; an empty text removes it."""
        with self._writing() as db:
            db.execute("DELETE FROM note WHERE latent = ?", (latent,))
            if text:
                db.execute("INSERT INTO note VALUES (?, ?, ?)", (latent, text, now()))
            _index(db, 2 * latent + 1, "note", latent, text)

    def labels(self, latent: int | None = None) -> dict[int, list[str]]:
        """Labels by latent, of one or of all that have some."""
        where, values = ("WHERE latent = ?", (latent,)) if latent is not None else ("", ())
        found: dict[int, list[str]] = {}
        for number, label in self._read(f"SELECT latent, label FROM label {where} ORDER BY latent, label", values):
            found.setdefault(number, []).append(label)
        return found

    def set_labels(self, latent: int, labels: Sequence[str]) -> None:
        """Replace the labels of a latent."""
        with self._writing() as db:
            db.execute("DELETE FROM label WHERE latent = ?", (latent,))
            db.executemany("INSERT OR IGNORE INTO label VALUES (?, ?)", [(latent, label) for label in labels])

    def lists(self) -> dict[str, list[int]]:
        """Latents of every list, in their order."""
        found: dict[str, list[int]] = {name: [] for (name,) in self._read("SELECT name FROM list ORDER BY name")}
        for name, latent in self._read("SELECT list, latent FROM list_member ORDER BY list, place"):
            found[name].append(latent)
        return found

    def set_list(self, name: str, latents: Sequence[int] | None) -> None:
        """Make a list of these latents, or remove it (None)."""
        with self._writing() as db:
            if latents is None:
                db.execute("DELETE FROM list WHERE name = ?", (name,))
                return
            db.execute("INSERT OR IGNORE INTO list VALUES (?, ?)", (name, now()))
            db.execute("DELETE FROM list_member WHERE list = ?", (name,))
            rows = [(name, latent, place) for place, latent in enumerate(dict.fromkeys(latents))]
            db.executemany("INSERT INTO list_member VALUES (?, ?, ?)", rows)

    # Concepts and answers

    def add_concept(self, name: str, definition: str, result: dict[str, Any]) -> None:
        """Keep the result of a search for a concept's latents."""
        with self._writing() as db:
            db.execute(
                "INSERT INTO concept(name, definition, created, result) VALUES (?, ?, ?, ?)",
                (name, definition, now(), json.dumps(result)),
            )

    def concepts(self) -> list[dict[str, Any]]:
        """Results of all searches for concepts, the newest first: name, definition, created, result."""
        rows = self._read("SELECT name, definition, created, result FROM concept ORDER BY id DESC")
        return [
            {"name": name, "definition": definition, "created": created, "result": self._details(result)}
            for name, definition, created, result in rows
        ]

    def answer(self, request: str) -> str | None:
        """A language model's answer to the request of this SHA-256, if it was given."""
        rows = self._read("SELECT answer FROM answer WHERE request = ?", (request,))
        return str(rows[0][0]) if rows else None

    def keep_answer(self, request: str, answer: str) -> None:
        """Remember an answer under its request's SHA-256."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO answer VALUES (?, ?, ?)", (request, answer, now()))

    # Search

    def search(self, text: str, limit: int = 100) -> list[Found]:
        """Explanations and notes that hold every word of `text`, best first; a word is any run of letters in them."""
        where, values = conditions(text)
        if not where:
            return []
        order = "ORDER BY rank" if "MATCH" in where else ""
        query = f"SELECT latent, text, kind FROM search WHERE {where} {order} LIMIT ?"
        return [Found(*row) for row in self._read(query, (*values, limit))]

    def matching(self, text: str) -> list[int]:
        """All latents that `search` would find, in any order; much faster, for it reads the index alone."""
        where, values = conditions(text)
        if not where:
            return []
        # As the triggers number the rows: notes are odd, explanations even.
        latent = (
            "CASE rowid % 2 WHEN 1 THEN rowid / 2 ELSE (SELECT latent FROM explanation WHERE id = search.rowid / 2) END"
        )
        return list(dict.fromkeys(row[0] for row in self._read(f"SELECT {latent} FROM search WHERE {where}", values)))

    # The file

    def _details(self, text: Any) -> dict[str, Any]:
        """A JSON object that a row holds; a stranger's file may hold anything there."""
        where = f"a row of {self.path}"
        return typed(dict[str, Any], parse_json(typed(str, text, where), where), where)

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        db = self._connection()
        return [] if db is None else db.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        if not self.writable:
            raise GranaryError("notes at a URL can't be changed: copy the latents folder to this machine first")
        with telling_disk_errors(self.path):
            if self._connection() is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._create()
            db = self._connection()
            assert db is not None
            with db:
                db.execute("BEGIN IMMEDIATE")
                yield db

    def _create(self) -> None:
        db = sqlite3.connect(self.path, timeout=30)
        try:
            with db:
                db.execute("BEGIN EXCLUSIVE")  # two processes may both want to be first
                if not db.execute("PRAGMA user_version").fetchone()[0]:
                    for statement in statements():
                        db.execute(statement)
        finally:
            db.close()

    def _connection(self) -> sqlite3.Connection | None:
        """This thread's connection; None where there are no notes yet.

        A file without a table is one whose first writer found the disk full, or was killed: it counts as none.
        """
        held: _Held | None = getattr(self._local, "held", None)
        if held is not None:
            return held.db
        if not self.path.exists():
            return None
        try:
            # Another thread may be the one in which the notes go.
            held = _Held(sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False))
            if not held.db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                return None
            version = held.db.execute("PRAGMA user_version").fetchone()[0]  # after the tables: committed with them
        except sqlite3.DatabaseError as error:
            raise GranaryError(f"{self.path} can't be read ({error}): move it away, or restore it") from None
        if version != VERSION:
            raise GranaryError(f"{self.path} has version {version} of the notes, this Granary reads {VERSION}")
        held.db.execute("PRAGMA foreign_keys = ON")
        held.db.execute("PRAGMA trusted_schema = OFF")  # the file may come from a stranger
        self._local.held = held
        return held.db


def _index(db: sqlite3.Connection, row: int, kind: str, latent: int, text: str) -> None:
    """Make `text` what the search finds in this row; empty: nothing."""
    db.execute("DELETE FROM search WHERE rowid = ?", (row,))
    if text:
        db.execute("INSERT INTO search(rowid, text, kind, latent) VALUES (?, ?, ?, ?)", (row, text, kind, latent))


def _is_good(score: Score) -> bool:
    """Whether a rule of this score may name its latent."""
    if score.value is None or score.value < NAMING:
        return False
    controls = score.details.get("controls")
    highest = (
        [one.get("high") for one in controls.values() if isinstance(one, dict)] if isinstance(controls, dict) else []
    )
    return all(score.low is not None and score.low > high for high in highest if isinstance(high, int | float))


def conditions(text: str) -> tuple[str, list[str]]:
    """(SQL, its values) for rows of the search that hold every word of `text`; empty where it has none."""
    words = text.split()
    long = [word for word in words if len(word) >= SHORTEST]
    found = ["search MATCH ?"] if long else []
    values = [" ".join('"' + word.replace('"', '""') + '"' for word in long)] if long else []
    for word in words:
        if len(word) < SHORTEST:
            found.append("text LIKE ? ESCAPE '\\'")
            values.append("%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%")
    return " AND ".join(found), values


def statements() -> list[str]:
    """The statements that make an empty file."""
    found, pending = [], ""
    for line in (files("shared.latents") / "notes.sql").read_text(encoding="utf-8").splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            found.append(pending)
            pending = ""
    return found


def now() -> str:
    """The time, as the notes write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
