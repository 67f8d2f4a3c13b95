"""Explanations and scores against judges of known worth, on real HTTP; the peers' faults by name."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.latents.folder import Latents
from stage_inspect.explain import language_command, marks
from stage_inspect.explain.endpoint import client
from stage_inspect.explain.examples import choose
from stage_inspect.explain.scores.scorer import Case, Judge
from stage_inspect.explain.scores.yes_or_no import YesOrNo, listed_numbers
from stage_inspect.explain.sides import Sides
from stage_inspect.explanations import take
from stage_inspect.export.__main__ import main as export
from tests.endpoint import Body, Reply, Stub, chat_answer, excerpts, stub
from tests.latents import synthetic_latents

JUDGED = "what latent {} does"
LISTS = ("detection", "fuzzing", "fuzzing_active")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Windows of four contexts' worth of blocks, so that both sides have some."""
    folder = tmp_path_factory.mktemp("explain") / "latents"
    return synthetic_latents(folder, 6, top=20, sample=60, num_windows=3072)


@pytest.fixture
def folder(latents: Latents, tmp_path: Path) -> Path:
    """A copy with an explanation of each latent that fires."""
    shutil.copytree(latents.url, tmp_path / "latents")
    notes = Latents.open(tmp_path / "latents").notes
    notes.add_explanations([(n, JUDGED.format(n), "person", "me", {}) for n in (0, 1)])
    return tmp_path / "latents"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)


def run(folder: Path, told: Stub, *more: str) -> None:
    base = [str(folder), "--endpoint", told.url, "--model", "m", "--latents", "0", "--test", "20", "--retries", "1"]
    language_command.main([*base, *more])


def scores(folder: Path, latent: int = 0) -> dict[str, Any]:
    notes = Latents.open(folder).notes
    return {one.scorer: one for own in notes.explanations(latent) for one in notes.scores(own.id)}


def oracle(folder: Path) -> Callable[[Stub, str, Body], Reply]:
    """Knows every window of every latent and where the marks belong; answers only for the right explanation."""
    opened = Latents.open(folder)
    right: dict[str, set[str]] = {}
    for number in (0, 1):
        records, _ = opened.records(number)
        windows = opened.examples(records, within_window=True)
        texts = {marks.plain(one) for one in windows}
        right[JUDGED.format(number)] = texts | {marks.marked(one, marks.hot_pieces(one)) for one in windows}

    def answer(_: Stub, __: str, body: Body) -> Reply:
        user = body["messages"][1]["content"]
        pattern = user.partition("Pattern: ")[2].partition("\n\n")[0]
        numbers = [int(text in right.get(pattern, set())) for text in excerpts(body)]
        content = [{"token": "[", "logprob": 0.0, "top_logprobs": []}]
        for number in numbers:
            other = {"token": str(1 - number), "logprob": -3.0}
            token = {"token": str(number), "logprob": -0.1}
            content += [{**token, "top_logprobs": [token, other]}, {"token": ", ", "logprob": 0.0}]
        return chat_answer(json.dumps(numbers), content)

    return answer


def constant(text: str) -> Callable[[Stub, str, Body], Reply]:
    return lambda _, __, body: json.dumps([int(text)] * len(excerpts(body)))


def random_judge(seed: int) -> Callable[[Stub, str, Body], Reply]:
    """By the hash of the question, so that no order of the threads changes what it says."""

    def answer(_: Stub, __: str, body: Body) -> Reply:
        digest = hashlib.sha256(json.dumps([seed, body["messages"]]).encode()).digest()
        return json.dumps([byte % 2 for byte in digest[: len(excerpts(body))]])

    return answer


def test_a_perfect_judge_gives_one_and_its_controls_a_half(folder: Path) -> None:
    with stub(oracle(folder)) as told:
        run(folder, told, "--of", "person")
    for name, one in scores(folder).items():
        assert (one.value, one.high) == (1.0, 1.0), name
        assert one.details["f1"]["value"] == one.details["auc"]["value"] == 1
        assert 0.8 < one.low < 1
        assert all(tenth["value"] == 1 for tenth in one.details["by_quantile"])
        controls = one.details["controls"]
        assert controls["shuffled"]["text"] == JUDGED.format(1)
        assert controls["empty"]["value"] == 0.5
        assert controls["shuffled"]["value"] < 0.75
        assert one.details["counts"]["unread"] == 0
    assert set(scores(folder)) == set(LISTS)


@pytest.mark.parametrize("always", ["1", "0"])
def test_always_one_answer_gives_a_half(folder: Path, always: str) -> None:
    """Not 0.71, which plain accuracy over four and ten would give to "none"."""
    with stub(constant(always)) as told:
        run(folder, told, "--of", "person")
    for one in scores(folder).values():
        assert one.value == 0.5
        assert one.details["auc"] == {"value": None, "why": "the endpoint gives no log probabilities"}
        assert {row["kind"] for row in one.details["failed"]} == {
            "false negative" if always == "0" else "false positive"
        }


def test_a_random_judge_has_a_half_in_its_interval(folder: Path) -> None:
    with stub(random_judge(3)) as told:
        run(folder, told, "--of", "person")
    for one in scores(folder).values():
        assert one.low < 0.5 < one.high
        assert one.low < one.value < one.high


def test_scores_go_to_delphi_and_come_back(folder: Path, latents: Latents, tmp_path: Path) -> None:
    """Every judged example, with its strings and activations: the same figures from delphi's files."""
    with stub(random_judge(3)) as told:
        run(folder, told, "--of", "person")
    export([str(folder), str(tmp_path / "delphi"), "--to", "delphi"])
    shutil.copytree(latents.url, tmp_path / "other")
    assert take(str(tmp_path / "other"), [tmp_path / "delphi"]) == 2
    mine, theirs = scores(folder), scores(tmp_path / "other")
    assert set(theirs) == {"detection", "fuzzing"}
    for name, one in theirs.items():
        assert (one.value, one.low, one.high) == (mine[name].value, mine[name].low, mine[name].high)
        assert one.details["f1"] == mine[name].details["f1"]
    (file,) = (tmp_path / "delphi" / "scores" / "detection").iterdir()
    rows = json.loads(file.read_text())
    assert len(rows) == len(mine["detection"].details["judged"])
    for row in rows:
        assert len(row["str_tokens"]) == len(row["activations"])
        assert any(row["activations"]) == row["activating"] == (row["distance"] >= 0)
        assert row["correct"] == (row["prediction"] == row["activating"])


@pytest.mark.parametrize(
    "reply",
    [
        "I am sorry, I can't help with that.", "[1, 0", "[1, 1, 1, 1, 1, 1, 1]", "[2, 2, 2, 2, 2]", "[]", "", "[[1]]",
        "[1, 0, 1, 0, 1] or rather [0, 1, 0, 1, 0]", {"choices": [{"message": {"content": None}}]},
    ],
)  # fmt: skip
def test_failures_counted(folder: Path, reply: Reply) -> None:
    """An answer that can't be read is a failure of its texts, told as one; it is not a zero, nor a score."""
    with stub(lambda *_: reply) as told:
        run(folder, told, "--of", "person", "--scores", "detection", "--latents", "0")
    one = scores(folder)["detection"]
    assert one.value is None
    assert one.details["why"] == "no answer could be read"
    counts = one.details["counts"]
    assert counts["unread"] == len(one.details["unread"]) == counts["active"] + counts["silent"] > 0
    assert not any(row["again"] for row in one.details["unread"])
    assert one.details["controls"]["empty"]["value"] is None


def test_an_endpoint_that_always_fails_gives_null_and_is_asked_again_later(folder: Path) -> None:
    with stub(lambda *_: (500, {}, "oops")) as told:
        run(folder, told, "--of", "person", "--scores", "detection", "--latents", "0")
    assert scores(folder)["detection"].value is None
    with stub(oracle(folder)) as better:
        told.answer, port = better.answer, better.url
        run(folder, Stub(better.answer, port), "--of", "person", "--scores", "detection", "--latents", "0")
    assert scores(folder)["detection"].value == 1


def test_some_failures_leave_the_others_their_score(folder: Path) -> None:
    judge = oracle(folder)

    def answer(told: Stub, path: str, body: Body) -> Reply:
        return "no" if "word7" in body["messages"][1]["content"] else judge(told, path, body)

    with stub(answer) as told:
        run(folder, told, "--of", "person", "--scores", "detection")
    one = scores(folder)["detection"]
    assert one.value == 1
    assert 0 < one.details["counts"]["unread"] < one.details["counts"]["active"] + one.details["counts"]["silent"]


def test_the_same_command_asks_nothing_again(folder: Path) -> None:
    with stub(oracle(folder)) as told:
        run(folder, told, "--of", "person")
        asked, made = len(told.asked), scores(folder)
        run(folder, told, "--of", "person")
        assert len(told.asked) == asked
    assert scores(folder) == made


def test_explainers(folder: Path) -> None:
    """Each sees what it should, and an answer without the line that was asked for is no explanation."""
    before = len(Latents.open(folder).notes.explanations())
    with stub(lambda *_: "Hm.\n[EXPLANATION]: words") as told:
        for name in ("default", "contrastive", "logits"):
            run(folder, told, "--explainer", name, "--scores", "--latents", "0")
        run(folder, told, "--scores", "--latents", "0")
    asked = [body["messages"][1]["content"] for body in told.asked]
    assert len(asked) == 3
    assert all("<<" in text and "Fires on: (" in text for text in asked)
    assert ["DOES NOT FIRE" in text for text in asked] == [False, True, False]
    assert ["MADE MORE LIKELY: '" in text for text in asked] == [False, False, True]
    made = Latents.open(folder).notes.explanations()[before:]
    assert [(one.text, one.method, one.author) for one in made] == [
        ("words", name, "m") for name in ("default", "contrastive", "logits")
    ]
    assert all(len(one.details["prompt_sha256"]) == 64 and "0.3" in one.details["highlight"] for one in made)


def test_a_parse_failure_is_no_explanation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(Latents.open(folder).notes.explanations())
    with stub(lambda *_: "Explanation could not be parsed.") as told:
        run(folder, told, "--scores")
    assert len(Latents.open(folder).notes.explanations()) == before
    assert "latent 0 has no explanation: failed: the answer has no line" in capsys.readouterr().out


def test_train_test_leak(latents: Latents) -> None:
    """No document, and no text, is both in an explanation's examples and in the test's."""
    sides = Sides(None, 0)
    for number in (0, 1, 2):
        chosen = choose(latents, number, sides, 40, 50)
        assert min(len(chosen.train), len(chosen.active), len(chosen.silent)) > 4
        train = {(one.context, one.document) for one in chosen.train + chosen.train_silent}
        tested = {(one.example.context, one.example.document) for one in chosen.tested}
        assert not train & tested
        assert {document for _, document in train | tested} == {1}  # the first ones may have begun in another context
        texts = [one.example.tokens.tobytes() for one in chosen.tested]
        assert len(set(texts)) == len(texts)
        assert not {one.tokens.tobytes() for one in chosen.train} & set(texts)
        assert all(not one.example.values.any() for one in chosen.silent)
        assert all(one.example.values.max() == one.example.value > 0 for one in chosen.active)


def test_quantiles_are_of_all_windows_and_zero_is_the_strongest(latents: Latents) -> None:
    chosen = choose(latents, 0, Sides(None, 0), 40, 50)
    means = {q: [one.example.value for one in chosen.active if one.quantile == q] for q in range(10)}
    strong = [values for values in means.values() if values]
    assert all(min(one) > max(other) for one, other in itertools.pairwise(strong))


def test_dead_latent_and_one_that_fires_everywhere(folder: Path) -> None:
    with stub(oracle(folder)) as told:
        run(folder, told, "--latents", "3", "--scores")
        assert not told.asked
    opened = Latents.open(folder)
    sides = Sides(None, 0)
    chosen = choose(opened, 0, sides, 40, 20)
    everywhere = replace(chosen, train_silent=[], silent=[])
    assert "0 windows of the documents for tests in which it is silent" in str(everywhere.why_not_tested)


def fuzz(latents: Latents, form: str) -> list[Any]:
    case = Case(choose(latents, 1, Sides(None, 0), 40, 50), Judge("http://x", "m"))
    return [text for question in YesOrNo(case, form).questions for text in question]


def test_fuzz_shortcut(latents: Latents) -> None:
    """Wrong marks stand elsewhere in every text, and every text has marks: neither is a signal."""
    found = fuzz(latents, "fuzzing")
    assert all("<<" in one.text for one in found)
    silent = [one for one in found if not one.truth]
    active = [one for one in found if one.truth]
    assert len({one.text.index("<<") for one in silent}) > len(silent) / 3
    assert {one.text.count("<<") for one in silent} <= {one.text.count("<<") for one in active}
    assert len({one.text for one in found}) == len(found)


def test_marks_of_active_fuzzing_are_wrong_in_half(latents: Latents) -> None:
    found = fuzz(latents, "fuzzing_active")
    assert sum(one.truth for one in found) * 2 == len(found) > 8
    for one in found:
        if not one.truth:
            hot = marks.hot_pieces(one.of.example)
            assert one.text != marks.marked(one.of.example, hot)
            assert one.text.replace("<<", "").replace(">>", "") == marks.plain(one.of.example)


def test_last_short_batch(latents: Latents) -> None:
    """The last question, which may hold fewer texts, is read like the others."""
    assert listed_numbers("[1, 0]", 2, 1) == [1, 0]
    assert listed_numbers("so: [1, 0]", 5, 1) is None
    assert listed_numbers("[true, 0]", 2, 1) is None


def test_scores_that_need_what_the_endpoint_lacks_say_so(folder: Path) -> None:
    with stub(lambda *_: "[]") as told:
        run(
            folder, told, "--of", "person", "--latents", "0", "--no-logprobs", "--scores", "embedding", "surprisal",
            "simulation",
        )  # fmt: skip
    found = scores(folder)
    assert {name: one.value for name, one in found.items()} == dict.fromkeys(("embedding", "surprisal", "simulation"))
    assert "--embedding-model" in found["embedding"].details["why"]
    assert "no log probabilities" in found["surprisal"].details["why"]


def test_simulation_by_one_who_knows(folder: Path) -> None:
    opened = Latents.open(folder)
    chosen = choose(opened, 0, Sides(None, 0), 40, 20)
    truth = {tuple(one.example.strings): marks.levels(one.example, one.example.value) for one in chosen.tested}

    def answer(_: Stub, __: str, body: Body) -> Reply:
        user = body["messages"][1]["content"]
        for strings, numbers in truth.items():
            listed = "\n".join(f"{number}. {text!r}" for number, text in enumerate(strings, 1))
            if user.endswith(listed) and JUDGED.format(0) in user:
                return json.dumps(numbers)
        return json.dumps([0] * int(user.rpartition(" tokens:")[0].rpartition("\n")[2]))

    with stub(answer) as told:
        run(folder, told, "--of", "person", "--latents", "0", "--scores", "simulation")
    one = scores(folder)["simulation"]
    assert 0.7 < one.low <= one.value <= one.high
    assert one.details["controls"]["empty"]["value"] is None
    assert one.details["values"].startswith("as written")


def test_embedding_and_surprisal_by_one_who_knows(folder: Path) -> None:
    opened = Latents.open(folder)
    chosen = choose(opened, 0, Sides(None, 0), 40, 20)
    active = {marks.plain(one.example) for one in chosen.active}

    def answer(_: Stub, path: str, body: Body) -> Reply:
        if path.endswith("embeddings"):
            vectors = [[1.0, float(one in active or JUDGED.format(0) in one)] for one in body["input"]]
            return {"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)][::-1]}
        prompt = body["prompt"]
        text = prompt.partition("\n\n")[2]
        gain = float(text in active and JUDGED.format(0) in prompt)
        told = {"text_offset": list(range(len(prompt) + 1)), "token_logprobs": [None, *[gain - 2.0] * len(prompt)]}
        return {"choices": [{"text": prompt, "logprobs": told}]}

    with stub(answer) as told:
        run(
            folder, told, "--of", "person", "--latents", "0", "--embedding-model", "e", "--scores", "embedding",
            "surprisal",
        )  # fmt: skip
    for one in scores(folder).values():
        assert one.value == 1
        assert one.details["controls"]["empty"]["value"] <= 0.5


def test_intruder(folder: Path) -> None:
    opened = Latents.open(folder)
    records, _ = opened.records(0)
    active = {marks.plain(one) for one in opened.examples(records, within_window=True)}

    def answer(_: Stub, __: str, body: Body) -> Reply:
        return str([text in active for text in excerpts(body)].index(False) + 1)

    with stub(answer) as told:
        run(folder, told, "--of", "person", "--latents", "0", "--scores", "intruder")
        asked = len(told.asked)
    one = scores(folder)["intruder"]
    assert one.value == 1
    assert asked == one.details["counts"]["questions"] > 1
    assert one.details["chance"] == 0.2
