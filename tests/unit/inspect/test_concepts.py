"""Labels on tokens, and planted latents that come first."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.vocabulary import Vocabulary
from shared.text.documents import documents
from stage_inspect.concepts.labels import Concepts, parse
from stage_inspect.concepts.marked import MarkedSpans
from stage_inspect.concepts.score import Detail, Tally, choose, score
from stage_inspect.concepts.search import Inspected, Reading, halves
from stage_inspect.find import main
from tests.planted import SOURCE


def test_f1_and_auroc_are_those_of_the_tokens_that_did_not_choose() -> None:
    """Against every threshold tried by hand on one half, and every pair of tokens of the other compared."""
    rng = np.random.default_rng(0)
    N, F, units = 400, 3, 5
    value = rng.integers(0, 9, (N, F))  # the bin, 0: silent
    truth = (value[:, 1] > 4) ^ (rng.random(N) < 0.1)
    chooses, inside, unit = rng.random(N) < 0.5, rng.random(N) < 0.9, rng.integers(0, units, N)
    tally = Tally.empty(1, 1, F)
    token, latent = np.nonzero(value * (chooses & inside)[:, None])
    tally.add(latent, value[token, latent], truth[None, token], np.ones((1, len(token)), bool))
    tally.yes_C[0] = (truth & chooses & inside).sum()
    chosen = choose(tally, 0, 0, 3)
    assert chosen[0].latent == 1
    detail = Detail([chosen], [0], units, F)
    token, latent = np.nonzero(value * ~chooses[:, None])
    detail.add(latent, value[token, latent], unit[token], truth[None, token], inside[None, token])
    detail.add_tokens(unit[~chooses], truth[None, ~chooses], inside[None, ~chooses])
    scored, counts = ~chooses & inside, chooses & inside
    found = score(detail, 0)
    for one, choice in zip(found, chosen, strict=True):
        said = [value[counts, one.latent] >= edge for edge in range(1, 9)]
        f1s = [2 * (yes & truth[counts]).sum() / (yes.sum() + truth[counts].sum()) for yes in said]
        assert (choice.f1, one.chosen_f1) == (pytest.approx(max(f1s)), choice.f1)
        yes, is_example = value[scored, one.latent] >= max(choice.edge, 1), truth[scored]
        assert one.f1 == pytest.approx(2 * (yes & is_example).sum() / (yes.sum() + is_example.sum()))
        assert one.precision == pytest.approx((yes & is_example).sum() / yes.sum())
        assert one.recall == pytest.approx((yes & is_example).sum() / is_example.sum())
        above = value[scored, one.latent][is_example][:, None] - value[scored, one.latent][~is_example]
        assert one.auroc == pytest.approx(((above > 0) + (above == 0) / 2).mean())
        assert one.low < one.f1 < one.high
        assert one.auroc_low < one.auroc < one.auroc_high
    # The interval: units drawn with replacement, all of their tokens together.
    again, f1s = np.random.default_rng(0), []
    yes = value[:, 1] >= chosen[0].edge
    for _ in range(1000):
        often = again.multinomial(units, np.full(units, 1 / units))[unit] * scored
        f1s.append(2 * (often * (yes & truth)).sum() / (often * yes + often * truth).sum())
    assert [found[0].low, found[0].high] == pytest.approx(np.quantile(f1s, [0.025, 0.975]).tolist())


def test_halves_are_long_runs_of_neighbours() -> None:
    for contexts in (np.arange(24), np.array([0, 1, 2, 9, 10, 30]), np.arange(1000)):
        choosing, scoring = halves(contexts)
        assert np.array_equal(np.sort(np.concatenate(choosing + scoring)), contexts)
        sizes = [sum(map(len, side)) for side in (choosing, scoring)]
        assert abs(sizes[0] - sizes[1]) <= min(64, len(contexts) / 2)
        assert all((np.diff(piece) == 1).all() for piece in choosing + scoring)
    assert [[len(piece) for piece in side] for side in halves(np.arange(24))] == [[12], [12]]
    with pytest.raises(GranaryError, match="give two at least"):
        halves(np.array([3]))


def find(study: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """What the command finds among all contexts."""
    main([str(study), "--split", "all", "--json", str(study / "found.json"), *arguments])
    found: dict[str, list[dict[str, Any]]] = json.loads((study / "found.json").read_text())
    return found


def test_planted_latents_come_first(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find(study, "--python", "number", "self", "comment", "--regex", "self", "# ?noise", "--token", "#")
    best = {name: matches[0] for name, matches in found.items()}
    assert {name: one["latent"] for name, one in best.items()} == {
        "number": 3, "self": 4, "comment": 5, "/self/": 4, "/# ?noise/": 5, "token #": 5,
    }  # fmt: skip
    for name in ("number", "self", "comment"):
        assert best[name]["f1"] > 0.97, (name, best[name])
        assert best[name]["auroc"] > 0.97, (name, best[name])
    kept = {one["name"] for one in Latents.open(study / "latents").notes.concepts()}
    assert kept >= best.keys()
    assert "number" in capsys.readouterr().out
    find(study, "--regex", "nowhere to be seen", "self")
    assert "left out: /nowhere to be seen/, no token of the half" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        find(study, "--regex", "nowhere to be seen")
    assert "there is nothing to look for: /nowhere" in capsys.readouterr().err


def test_no_document_chooses_and_scores(study: Path) -> None:
    inspected = Inspected.open(Latents.open(study / "latents"), None, None)
    store = inspected.store
    whole = {int(one.places[0]): one for one in documents(store, np.arange(store.num_contexts), inspected.vocabulary)}
    assert [one.text for one in whole.values()][:-1] == [SOURCE] * (len(whole) - 1)
    choosing, scoring = halves(np.arange(store.num_contexts))
    reading = Reading(inspected, Concepts(python=("self",)), lambda _: None)
    tokens = [sum(int(part.inside_SN.sum()) for part in reading.of(choosing))]
    chose = set(reading.seen)
    reading.leave_out(choosing)
    tokens.append(sum(int(part.inside_SN.sum()) for part in reading.of(scoring)))
    of_choosing = np.concatenate(choosing)
    left = {start for start, one in whole.items() if not np.isin(one.places // 96, of_choosing).any()}
    assert set(reading.seen) == left
    assert not chose & left
    assert len(left) >= 3
    assert tokens == [96 * len(of_choosing), sum(len(whole[start].places) for start in left)]


def test_marked_spans(study: Path, tmp_path: Path) -> None:
    """By passages, which stand for each of their places, and by documents, which are counted within the context."""
    file = tmp_path / "spans.jsonl"
    passage = "if times > 0x1F: raise"
    lines = [{"text": passage, "start": 11, "end": 15, "label": "hexadecimal"}, {"text": "# noise"}]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = find(study, "--spans", str(file))["marked hexadecimal"][0]
    assert found["latent"] == 3
    assert found["f1"] == found["precision"] == found["recall"] == 1
    # Outside of what was looked at latent 3 fires on other numbers: they are no mistakes until somebody looks at them.
    file.write_text(file.read_text() + json.dumps({"text": "times: int = 3, *,"}) + "\n")
    assert find(study, "--spans", str(file))["marked hexadecimal"][0]["precision"] == pytest.approx(4 / 5)

    inspected = Inspected.open(Latents.open(study / "latents"), None, None)
    rows = []
    for one in documents(inspected.store, np.arange(inspected.store.num_contexts), inspected.vocabulary):
        ends = [*list(one.parts.values())[1:], len(one.tokens)]
        for (context, number), first, end in zip(one.parts, one.parts.values(), ends, strict=True):
            text = one.text[int(one.starts[first]) : int(one.starts[end])]
            rows.append({"document": [context, number]})
            rows += [
                {"document": [context, number], "start": match.start(), "end": match.end(), "label": "self"}
                for match in re.finditer("self", text)
            ]
    assert any(row["document"][1] == 1 for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find(study, "--spans", str(file))["marked self"][0]
    assert found["latent"] == 4  # which does not fire on the one within a string
    assert 0.6 < found["f1"] < 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is not JSON"),
        ('{"start": 1}', "either a text or a document"),
        ('{"text": "ab", "start": 1, "end": 3, "label": "x"}', "ends at 3, its text at 2"),
        ('{"text": "ab", "start": 1, "end": 1, "label": "x"}', "start below end"),
        ('{"text": "ab", "start": 0, "end": 1, "label": ""}', "the label must be a name"),
        ('{"text": ""}', "a passage of the corpus"),
        ('{"document": "a"}', r"must be \[context, number"),
        ('{"text": "ab"}', "marks nothing"),
    ],
)
def test_wrong_spans_are_told(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "spans.jsonl").write_text(line)
    with pytest.raises(GranaryError, match=told):
        MarkedSpans.read(tmp_path / "spans.jsonl")


def test_wrong_concepts_are_told() -> None:
    vocabulary = Vocabulary.of([b"a"])
    for arguments, told in (
        ((["nonsense"], [], []), "is no concept of Python"),
        (([], ["("], []), "is no regular expression"),
        (([], [], ["zz"]), "is no token"),
        (([], [], []), "say what to look for"),
    ):
        with pytest.raises(GranaryError, match=told):
            parse(*arguments, vocabulary)
    assert Concepts().names == []
