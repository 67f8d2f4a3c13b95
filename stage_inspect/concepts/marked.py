"""Spans that a person marked, from a JSON Lines file.

    {"text": "a passage of the corpus", "start": 2, "end": 9, "label": "noun"}
    {"document": [12, 0], "start": 40, "end": 51, "label": "noun"}
    {"document": [12, 1]}

`start` and `end` count characters of the passage, or of the document: number 0 in context 12 of the store, as an
example's `context` and `document` say. A passage stands for every place at which the corpus holds it. A line without a
label says that its passage or document was looked at and holds no span. What no line names was not looked at, and is
neither an example nor a counterexample.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.text.documents import Document, Span

Labelled = tuple[int, int, str]


@dataclass(frozen=True)
class MarkedSpans:
    """What a file of spans says."""

    labels: tuple[str, ...] = ()
    passages: dict[str, list[Labelled]] = field(default_factory=dict)
    documents: dict[tuple[int, int], list[Labelled]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "MarkedSpans":
        """Raises GranaryError, naming the line, for what is no span."""
        passages: dict[str, list[Labelled]] = defaultdict(list)
        documents: dict[tuple[int, int], list[Labelled]] = defaultdict(list)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise GranaryError(f"{path} can't be read as spans: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                where, span = _parse(line, f"{path}, line {number}")
                spans = passages[where] if isinstance(where, str) else documents[where]
                spans += [] if span is None else [span]
        labels = {label for spans in [*passages.values(), *documents.values()] for _, _, label in spans}
        if not labels:
            raise GranaryError(
                f"{path} marks nothing: a line is {{'text': ..., 'start': 0, 'end': 5, 'label': 'name'}}"
            )
        return cls(tuple(sorted(labels)), dict(passages), dict(documents))

    def of(self, document: Document) -> tuple[dict[str, list[Span]], list[Span]]:
        """Spans of each label in a document, and the stretches of it that were looked at."""
        found: dict[str, list[Span]] = {label: [] for label in self.labels}
        seen: list[Span] = []
        for start, stop, spans in self._places(document):
            seen.append((start, stop))
            for first, last, label in spans:
                if last > stop - start:
                    raise GranaryError(
                        f"the span {first} to {last} of {label!r} ends behind its document's {stop - start}"
                    )
                found[label].append((start + first, start + last))
        return found, seen

    def _places(self, document: Document) -> list[tuple[int, int, list[Labelled]]]:
        """(first character, end, spans) of every passage and part of a document that is named."""
        found = []
        parts = sorted(document.parts.items(), key=lambda part: part[1])
        ends = [*(document.starts[token] for _, token in parts[1:]), len(document.text)]
        for (name, token), end in zip(parts, ends, strict=True):
            if name in self.documents:
                found.append((int(document.starts[token]), int(end), self.documents[name]))
        for passage, spans in self.passages.items():
            at = document.text.find(passage)
            while at >= 0:
                found.append((at, at + len(passage), spans))
                at = document.text.find(passage, at + len(passage))
        return found


def _parse(line: str, where: str) -> tuple[str | tuple[int, int], Labelled | None]:
    """(passage, or context and number of a document; start, end and label where it has them)."""
    record = parse_json(line, where)
    if not isinstance(record, dict) or ("text" in record) == ("document" in record):
        raise GranaryError(f"{where} must have either a text or a document")
    place: str | tuple[int, int]
    if "text" in record:
        place = record["text"]
        if not isinstance(place, str) or not place:
            raise GranaryError(f"{where}: the text must be a passage of the corpus")
    else:
        named = record["document"]
        if not isinstance(named, list) or len(named) != 2 or not all(type(one) is int and one >= 0 for one in named):
            raise GranaryError(f"{where}: the document must be [context, number in it]")
        place = (named[0], named[1])
    if "label" not in record:
        return place, None
    start, end, label = record.get("start"), record.get("end"), record["label"]
    if not isinstance(label, str) or not label:
        raise GranaryError(f"{where}: the label must be a name")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise GranaryError(f"{where}: start and end must be numbers of characters, start below end")
    if isinstance(place, str) and end > len(place):
        raise GranaryError(f"{where}: the span ends at {end}, its text at {len(place)}")
    return place, (start, end, label)
