"""What the pages read, as JSON and columns: the same documents for the server, a static folder and a single file.

Text leaves here as strings and is shown as text nodes; it is never markup.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.latents import Example, Latents
from shared.latents.examples import DECILES
from shared.latents.folder import Related
from shared.store.format.image_table import IMAGE, MARKS_KIND
from stage_inspect.explorer.columns import COLUMNS, RULE_F1, Column
from stage_inspect.explorer.explained import explained, is_number, kept_example, short
from stage_inspect.explorer.feeds import Feeds
from stage_inspect.explorer.limits import TOKEN_HITS
from stage_inspect.explorer.pictures import pictures_of

TOP, PER_DECILE, SILENT = 24, 3, 6  # examples of each kind that a page begins with
REGION = "▦"  # in a text, of an image
RELATED, LISTED = 10, 8  # latents and tokens listed beside them
BLOCK = 64  # latents whose names and tokens come together
STRONGEST_TOKENS = 6
SCORES = ("f1", "low", "high", "precision", "recall", "auroc")  # of a latent as the detector of a concept
MORE_SCORES = ("auroc_low", "auroc_high", "chosen_f1")  # which a result of an earlier version may lack


class Documents:
    """All documents of one latents folder."""

    def __init__(self, latents: Latents, title: str) -> None:
        self.latents, self.title = latents, title
        self.feeds: Feeds | None = None
        """What lies between this dictionary's latents and those of others, where that is known."""
        self._best = latents.notes.best_scores("rule_f1")
        self.columns = [column for column in COLUMNS if column.name in latents.table]
        self.columns += [RULE_F1] if self._best else []
        self.dtypes = {column.name: self._stored(column).dtype.str[1:] for column in self.columns}
        """How a column's numbers are sent: u4 or f4."""

    # The folder

    def meta(self, **capabilities: Any) -> dict[str, Any]:
        """What the pages must know before they show anything; `capabilities` says what the place they are at can do."""
        meta = self.latents.meta
        counts, dictionary = meta.counts, meta.dictionary
        sites = list(dict.fromkeys([*dictionary["reads"], *dictionary["writes"]]))
        kind = f"{dictionary.get('activation') or ''} {dictionary['kind']}".strip()
        return {
            "title": self.title,
            "kind": kind,
            "about": f"What {meta.num_latents:,} latents do: one pass over {counts['tokens']:,} tokens, read at "
            f"{', '.join(dictionary['reads'])} of {meta.model.get('id', 'a model')}.",
            "model": meta.model.get("id"),
            "sites": sites,
            "d_latent": meta.num_latents,
            "tokens": counts["tokens"],
            "documents": counts["documents"],
            "block": BLOCK,
            "columns": [
                {
                    "name": one.name,
                    "title": one.title,
                    "help": one.help,
                    "kind": one.kind,
                    "shown": one.shown,
                    "listed": one.listed,
                    "dtype": self.dtypes[one.name],
                }
                for one in self.columns
            ],
            "map": any(one.name == "map_x" for one in self.columns),
            "concepts": len(self.latents.notes.concepts()),
            "origin": self._origin(),
            **capabilities,
        }

    def column(self, name: str) -> bytes:
        """A column's bytes, little-endian: uint32 for counts, float32 for the others. Raises GranaryError."""
        for one in self.columns:
            if one.name == name:
                return self._stored(one).tobytes()
        raise GranaryError(f"there is no column {name}")

    def rows(self, block: int) -> dict[str, tuple[str | None, list[str]]]:
        """Name and strongest tokens of the latents of one block, by latent. Raises GranaryError past the last."""
        first, last = block * BLOCK, min((block + 1) * BLOCK, self.latents.num_latents)
        if block < 0 or first >= last:
            raise GranaryError(f"there is no block {block} of latents")
        return self.named(range(first, last))

    def named(self, latents: Sequence[int]) -> dict[str, tuple[str | None, list[str]]]:
        """Name and strongest tokens of these latents, by latent."""
        names = self.names(latents)
        tokens = self.latents.array("tokens/firing").take(np.asarray(latents, np.int64))[:, :STRONGEST_TOKENS]
        return {
            str(latent): (names.get(latent), [self._text(token) for token in row if token >= 0])
            for latent, row in zip(latents, tokens.tolist(), strict=True)
        }

    def search(self, query: str) -> dict[str, Any]:
        """Latents whose notes or explanations hold these words, then those that fire on the token."""
        if not query.strip():
            return {"latents": [], "total": 0}
        found = self.latents.notes.matching(query)
        with suppress(GranaryError):  # no token of the vocabulary
            found += [hit.latent for hit in self.latents.find(token=query, limit=TOKEN_HITS)]
        unique = list(dict.fromkeys(found))
        return {"latents": unique, "total": len(unique)}

    def concepts(self) -> list[dict[str, Any]]:
        """The newest result for each concept that was searched for, by name, with what its latents fire on."""
        newest: dict[str, dict[str, Any]] = {}
        for found in self.latents.notes.concepts():
            newest.setdefault(found["name"], found)
        shown = []
        for name, found in sorted(newest.items()):
            result = found["result"] if isinstance(found["result"], dict) else {}
            rows = [row for row in result.get("latents", []) if self._is_match(row)]
            told = self.named([row["latent"] for row in rows])
            shown.append(
                {
                    "name": name,
                    "definition": found["definition"],
                    "split": str(result.get("split", "")),
                    "latents": [
                        [
                            row["latent"],
                            *told[str(row["latent"])],
                            *(short(row[score]) for score in SCORES),
                            *(short(row[score]) if is_number(row.get(score)) else None for score in MORE_SCORES),
                        ]
                        for row in rows
                    ],
                }
            )
        return shown

    # One latent

    def latent(self, index: int) -> dict[str, Any]:
        """All that its page shows. Raises GranaryError for a latent that is not there."""
        latents = self.latents
        one = latents.latent(index)
        near = latents.neighbours(index)[:RELATED]
        together = {name: getattr(one, name)[:RELATED] for name in ("jaccard", "npmi", "pearson")}
        named = self.named(sorted({related.latent for group in (near, *together.values()) for related in group}))

        def related(group: Iterable[Related]) -> list[list[Any]]:
            return [[each.latent, short(each.value), *named[str(each.latent)]] for each in group]

        return {
            "latent": index,
            "numbers": {name: clean(one.numbers[name]) for name in NUMBERS if name in one.numbers},
            "histogram": self._histogram(one.histogram, one.numbers["max"]),
            "pictures": pictures_of(latents, index),
            "groups": self._groups(index),
            "logits": {
                "top": [[weight.text, short(weight.value)] for weight in one.promoted[:LISTED]],
                "bottom": [[weight.text, short(weight.value)] for weight in one.demoted[:LISTED]],
            }
            if one.promoted
            else None,
            "tokens": {
                "on": [[token.text, short(token.share)] for token in one.tokens[:LISTED]],
                "next": [[token.text, short(token.share)] for token in one.next_tokens[:LISTED]],
            },
            "neighbours": related(near),
            "together": {name: related(group) for name, group in together.items()},
            "together_tokens": latents.meta.together_tokens,
            "feeds": self.feeds.of(index) if self.feeds is not None else None,
            "explanations": [
                explained(said, latents.notes.scores(said.id), self._failed(index)) for said in one.explanations
            ],
            "note": one.note,
            "labels": one.labels,
        }

    def more(self, index: int) -> list[dict[str, Any]]:
        """The strongest examples behind those that `latent` gives."""
        return [self.example(one) for one in self.latents.top(index, start=TOP, count=10_000)]

    def names(self, latents: Iterable[int]) -> dict[int, str]:
        """What a person noted on a latent, or its newest explanation; those without either are left out."""
        found = ((latent, self.latents.notes.name(latent)) for latent in latents)
        return {latent: name for latent, name in found if name is not None}

    def example(self, one: Example, rank: str | None = None) -> dict[str, Any]:
        """An example with its text in pieces: one string per token, empty where a character of before goes on."""
        special = [piece.start for piece in one.pieces if piece.is_special]
        at = np.flatnonzero(one.values)
        found: dict[str, Any] = {
            "pieces": one.strings if one.kind is None else with_regions(one),
            "at": at.tolist(),
            "a": [short(value) for value in one.values[at]],
            "peak": one.peak,
            "value": float(f"{one.value:.6g}"),
            "context": one.context,
            "start": one.start,
        }
        if special:
            found["special"] = special
        if rank is not None:
            found["rank"] = rank
        return found

    def _failed(self, index: int) -> Callable[[Any], dict[str, Any] | None]:
        """Failed examples of a score as the page shows them: kept with it, or numbers of the latent's records."""

        def shown(record: Any) -> dict[str, Any] | None:
            if isinstance(record, int) and not isinstance(record, bool):
                records, _ = self.latents.records(index)
                return (
                    self.example(self.latents.examples(records.take([record]))[0])
                    if 0 <= record < len(records)
                    else None
                )
            one = kept_example(record, self.latents)
            return self.example(one, str(record["kind"])) if one is not None else None

        return shown

    def _groups(self, index: int) -> list[dict[str, Any]]:
        latents = self.latents
        records, num_top = latents.records(index)
        sampled = len(records) - num_top
        groups = [
            {
                "name": "top",
                "title": "Strongest",
                "note": "The windows of text with the largest activations, at most one of a document.",
                "examples": [self.example(one) for one in latents.top(index, TOP)],
                "total": num_top,
            }
        ]
        if sampled:
            spread = [
                self.example(one, f"decile {quantile + 1} of {DECILES}")
                for quantile in range(DECILES)
                for one in latents.sample(index, quantile=quantile, count=PER_DECILE)
            ]
            groups.append(
                {
                    "name": "ranks",
                    "title": "By rank",
                    "note": f"An unbiased sample of the {int(latents.table['windows'][index]):,} windows in which it"
                    " fires, from the strongest tenth to the weakest.",
                    "examples": spread,
                    "total": len(spread),
                }
            )
        silent = [self.example(one) for one in latents.silent(index, SILENT)]
        if silent:
            groups.append(
                {
                    "name": "silent",
                    "title": "Silent",
                    "note": "Windows drawn by chance in which it was checked not to fire.",
                    "examples": silent,
                    "total": len(silent),
                }
            )
        return groups

    def _histogram(self, counts: npt.NDArray[np.uint64], largest: float) -> dict[str, Any]:
        """The bins from the first to the last that is not empty; the open ends are closed for display."""
        filled = np.flatnonzero(counts)
        if not len(filled):
            return {"edges": [], "counts": []}
        first, last = int(filled[0]), int(filled[-1])
        edges = self.latents.histogram_edges[first : last + 2].tolist()
        if first == 0:
            edges[0] = edges[1] / 2 ** (1 / 3)
        if not np.isfinite(edges[-1]):
            edges[-1] = max(largest, edges[-2] * 2 ** (1 / 3))
        return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts[first : last + 1].tolist()}

    def _stored(self, column: Column) -> npt.NDArray[Any]:
        if column is RULE_F1:
            found = np.full(self.latents.num_latents, np.nan, "<f4")
            inside = {latent: value for latent, value in self._best.items() if 0 <= latent < len(found)}
            found[list(inside)] = list(inside.values())
            return found
        values = self.latents.table[column.name]
        is_count = column.kind == "count" and (not len(values) or int(values.max()) < 1 << 32)
        return values.astype("<u4" if is_count else "<f4")

    def _is_match(self, row: Any) -> bool:
        """Whether a row of a stored result is of a latent that is here, with all its scores."""
        if not isinstance(row, dict) or not isinstance(row.get("latent"), int):
            return False
        has_scores = all(is_number(row.get(score)) for score in SCORES)
        return 0 <= row["latent"] < self.latents.num_latents and has_scores

    def _text(self, token: int) -> str:
        vocabulary = self.latents.vocabulary
        return vocabulary.text_of(token) if vocabulary is not None else f"<token {token}>"

    def _origin(self) -> list[tuple[str, str]]:
        meta = self.latents.meta
        counts = meta.counts
        settings = ", ".join(f"{key} {value}" for key, value in meta.settings.items() if key != "identity")
        rows = [
            ("Dictionary", f"{meta.dictionary.get('path', '')} · sha256 {meta.dictionary.get('sha256', '')}"),
            ("Store", f"{meta.store.get('url', '')} · digest {meta.store.get('digest', '')}"),
            ("Model", ", ".join(str(value) for key in ("id", "revision", "dtype") if (value := meta.model.get(key)))),
            (
                "Read",
                f"{counts['tokens']:,} tokens of {counts['contexts']:,} contexts, {meta.store.get('split', 'all')}",
            ),
            ("Settings", settings),
            ("Versions", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
        ]
        return [(name, value) for name, value in rows if value]


NUMBERS = ("fired", "density", "max", "mean", "std", "skew", "kurtosis", "windows", "documents",
           "encoder_decoder_cosine")  # fmt: skip


def with_regions(one: Example) -> list[str]:
    """Strings of an example's tokens, where a region of an image is a sign for it."""
    assert one.kind is not None
    is_region = (one.kind & MARKS_KIND) == IMAGE
    return [REGION if region else text for text, region in zip(one.strings, is_region.tolist(), strict=True)]


def clean(value: float) -> float | int | None:
    """A number as JSON knows it: None for what is not finite, six digits of the others."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None
