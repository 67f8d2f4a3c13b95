"""Planted latents whose rules are known, one that fires by chance, and the counts against brute force."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.notes import Explanation
from shared.latents.vocabulary import Vocabulary
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from stage_inspect.concepts.search import Inspected
from stage_inspect.explain.rules.command import main, rules
from stage_inspect.explain.rules.corpus import Corpus, choose_runs, read, side_of
from stage_inspect.explain.rules.score import Scoring
from stage_inspect.explain.rules.search import Search, best_set
from stage_inspect.inspect import inspect
from tests.inspection import HOOK, inspect_config, small_sae, small_store
from tests.synthetic import synthetic_plan, synthetic_store
from tests.variants import OF_ROWS, PLACES, make

WORDS = ["cat", "dog", " runs", " ran", " walking", " talking", " singing", " eating", "(", ")", "\n", "7", " the", "#"]
T, CONTEXTS, D = 64, 48, 8
TOKEN, AFTER, AFFIX, CHANCE, FIRST = range(5)
"""Latents: on cat or dog; on cat after an opening bracket; on words in -ing; by chance; on a document's first token."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random words whose documents go on in the next context, and latents that fire as planned."""
    folder = tmp_path_factory.mktemp("rules")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, len(WORDS) + 1, (CONTEXTS, T)).astype(np.int32)
    behind = np.roll(tokens, 1, axis=1) == WORDS.index("(") + 1
    tokens[behind & (rng.random((CONTEXTS, T)) < 0.7)] = WORDS.index("cat") + 1
    segments = np.sort(rng.integers(0, 2, (CONTEXTS, T)), axis=1).astype(np.int32)
    tokens[-1], segments[-1] = tokens[-3], segments[-3]
    word = np.array(["", *WORDS])[tokens]
    before = np.concatenate([np.full((CONTEXTS, 1), ""), word[:, :-1]], axis=1)
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    before[starts] = ""
    x = np.full((CONTEXTS, T, D), -1, np.float32)
    fires = {
        TOKEN: np.isin(word, ["cat", "dog"]),
        AFTER: (word == "cat") & (before == "("),
        AFFIX: np.char.endswith(word, "ing"),
        CHANCE: rng.random((CONTEXTS, T)) < 0.1,
        FIRST: starts,
    }
    for latent, on in fires.items():
        x[..., latent][on] = rng.uniform(0.5, 2, on.sum())
    plan = synthetic_plan(
        CONTEXTS, T, D, hooks={HOOK: D}, dtype="float32", heldout_fraction=0.2,
        provenance={"model": {"id": "planted"}, "packing": {"mode": "isolated", "long_documents": "split"}},
    )  # fmt: skip
    store = Store.create(folder / "store", plan, tokens, np.ones_like(tokens, bool), segments)
    for shard in store.pending():
        span = store.shard_contexts(shard)
        store.write_shard(shard, {HOOK: torch.from_numpy(x[span.start : span.stop].copy())})
    store.finalize()
    sae = SAE(SAEConfig(d_model=D, d_latent=D, activation="relu", k=None, normalisation="none", pre_bias=False,
                        sites=Sites.of(HOOK)))  # fmt: skip
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
    sae.save_pretrained(folder / "sae")
    vocabulary = [b"<s>", *(text.encode() for text in WORDS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage_inspect.finish.finish.recorded_vocabulary", lambda *_: (vocabulary, (0,)))
        inspect(inspect_config(folder))
    return folder


@pytest.fixture(scope="module")
def inspected(study: Path) -> Inspected:
    return Inspected.open(Latents.open(study / "latents"), None, None)


@pytest.fixture(scope="module")
def corpus(inspected: Inspected) -> Corpus:
    runs = choose_runs(np.arange(CONTEXTS), T, CONTEXTS * T)
    return read(inspected, runs, python=None, tell=lambda _: None)


def test_planted_rules_are_found_and_hold_on_other_documents(inspected: Inspected, corpus: Corpus) -> None:
    found = {one.latent: one for one in rules(inspected, corpus, list(range(D)), lambda _: None)}
    assert sorted(found) == [TOKEN, AFTER, AFFIX, CHANCE, FIRST]
    assert found[TOKEN].text in ("token is 'cat' or 'dog'", "token is 'dog' or 'cat'")
    assert found[AFTER].text == "token is 'cat'; after '('"
    assert found[FIRST].details["rule"] == [{"label": "position below 1", "is": True}]
    assert set(found[AFFIX].details["rule"][0]) <= {"token", "ends"}
    for latent in (TOKEN, AFTER, AFFIX, FIRST):
        scorer, value, low, high, told = found[latent].scores[0]
        assert (scorer, value, low, high, told["precision"], told["recall"]) == ("rule_f1", 1, 1, 1, 1, 1)
        assert told["controls"]["shuffled"]["value"] < 0.6
        assert told["failed"] == []
    _, value, low, high, told = found[CHANCE].scores[0]
    rate = told["base_rate"]
    assert value is not None
    assert low is not None
    assert high is not None
    assert low < 2 * rate / (1 + rate) < high + 0.05
    assert value < 0.25
    assert told["controls"]["empty"]["value"] == pytest.approx(2 * rate / (1 + rate))
    failed = told["failed"]
    assert {one["kind"] for one in failed} >= {"false negative"}
    assert all(one["values"][one["peak"]] > 0 for one in failed if one["kind"] == "false negative")
    assert all(one["values"][one["peak"]] == 0 for one in failed if one["kind"] == "false positive")


def test_no_document_is_in_both_halves(inspected: Inspected, corpus: Corpus) -> None:
    """Whatever run of contexts a document is met in, and however often it stands in the corpus."""
    store = inspected.store
    seen = set(corpus.train.place.tolist()), set(corpus.heldout.place.tolist())
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == CONTEXTS * T
    assert not set(corpus.train.heads) & set(corpus.heldout.heads)
    assert {side_of(head) for head in corpus.train.heads} == {0}
    alone = read(inspected, [np.array([number]) for number in range(CONTEXTS)], python=None, tell=lambda _: None)
    assert set(alone.train.heads) == set(corpus.train.heads)
    # A document goes on where a context does not end in padding, so the last of one is the first of the next.
    ends = store.segments(np.arange(CONTEXTS))
    for context in range(CONTEXTS - 1):
        assert ends[context, -1] >= 0
        last, first = (context + 1) * T - 1, (context + 1) * T
        assert (last in seen[0]) == (first in seen[0])


def test_one_document_is_too_few(inspected: Inspected) -> None:
    with pytest.raises(GranaryError, match=r"documents of .* are too few"):
        read(inspected, [np.arange(1)], python=False, tell=lambda _: None)


def test_the_best_set_is_that_of_all_sets() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        said = rng.integers(1, 9, 7)
        right, fired = rng.integers(0, said + 1), 20

        def f1(some: tuple[int, ...], right: Any = right, said: Any = said) -> float:
            return float(2 * right[list(some)].sum() / (said[list(some)].sum() + 20))

        sets = [some for size in (1, 2, 3) for some in itertools.combinations(range(7), size)]
        chosen, reached = best_set(right, said, fired, most=3)
        assert reached == pytest.approx(max(map(f1, sets)))
        assert f1(tuple(chosen.tolist())) == pytest.approx(reached)


def test_f1_is_that_of_every_token_looked_at(inspected: Inspected, corpus: Corpus) -> None:
    vocabulary = inspected.vocabulary
    search, scoring = Search(corpus.train, corpus.labels, vocabulary), Scoring(corpus.heldout, len(vocabulary))
    for latent in range(5):
        found = search.find(latent)
        assert found is not None
        for half, told in ((corpus.train, found.f1), (corpus.heldout, None)):
            fires = np.zeros(half.num_tokens, bool)
            fires[half.firing(latent)[0]] = True
            says = np.ones(half.num_tokens, bool)
            for one in found.rule.record():
                for number in range(half.num_tokens):
                    says[number] &= holds(one, half, number, corpus, vocabulary)
            f1 = 2 * (says & fires).sum() / (says.sum() + fires.sum())
            measured = scoring.measure(scoring.said(found.rule), latent)
            assert f1 == pytest.approx(told if told is not None else measured.value)  # type: ignore[union-attr]


def holds(condition: dict[str, Any], half: Any, number: int, corpus: Corpus, vocabulary: Vocabulary) -> bool:
    """One condition of a rule's record, on one token."""
    text = vocabulary.text_of(int(half.channels["token"][number])).strip()
    if "ends" in condition:
        return text.endswith(condition["ends"])
    if "begins" in condition:
        return text.startswith(condition["begins"])
    if "label" in condition:
        names = [label.name for label in corpus.labels.all]
        return bool(half.labels_NJ[number, names.index(condition["label"])]) == condition["is"]
    ((channel, ids),) = condition.items()
    return int(half.channels[channel][number]) in ids


def test_the_command_replaces_its_own_rules_alone(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = Latents.open(study / "latents").notes
    mine = notes.add_explanation(TOKEN, "pets", method="person", author="me")
    keys = ["--tokens", "100000", "--json", str(study / "rules.json")]
    main([str(study), *keys])
    assert "5 written to the notes" in capsys.readouterr().out
    first: list[Explanation] = notes.explanations()
    written = (study / "rules.json").read_bytes()
    main([str(study), *keys])
    assert "0 written to the notes" in capsys.readouterr().out
    assert notes.explanations() == first
    assert (study / "rules.json").read_bytes() == written
    rule = next(one for one in first if one.latent == TOKEN and one.method == "rule")
    assert notes.scores(rule.id)[0].value == 1
    assert notes.name(TOKEN) == "pets"
    assert notes.name(AFTER) == "token is 'cat'; after '('"
    assert notes.name(CHANCE) is None
    notes.replace_explanations("rule", "granary", [TOKEN], [])
    assert [one.id for one in notes.explanations(TOKEN)] == [mine]
    assert TOKEN not in notes.matching("'cat'")
    main([str(study), "--tokens", "100000", "--latents", "0"])
    assert "1 written to the notes" in capsys.readouterr().out
    assert notes.best_scores("rule_f1")[TOKEN] == 1
    with pytest.raises(SystemExit):
        main([str(study), "--tokens", "0"])
    assert "--tokens 0: at least 1" in capsys.readouterr().err
    assert json.loads(written)[0]["latent"] == TOKEN


@pytest.mark.parametrize(
    "kind", [kind if kind == "clt" else pytest.param(kind, marks=pytest.mark.slow) for kind in OF_ROWS]
)
def test_every_kind_of_dictionary_has_rules(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary = make(kind).dictionary
    sites, widths = PLACES[kind]
    hooks = dict(zip([*sites.reads, *sites.writes], [*widths.reads, *widths.writes], strict=True))
    plan = synthetic_plan(12, T, D, hooks=hooks, dtype="float32", heldout_fraction=0.2)
    synthetic_store(tmp_path / "store", plan)
    dictionary.save_pretrained(tmp_path / "sae")
    with pytest.MonkeyPatch.context() as patch:
        words = [bytes([97 + number % 26, 97 + number // 26 % 26]) for number in range(1000)]
        patch.setattr("stage_inspect.finish.finish.recorded_vocabulary", lambda *_: (words, ()))
        inspect(inspect_config(tmp_path))
    main([str(tmp_path), "--tokens", "2000"])
    assert "written to the notes" in capsys.readouterr().out
    notes = Latents.open(tmp_path / "latents").notes
    assert notes.explanations()
    assert all(notes.scores(one.id)[0].scorer == "rule_f1" for one in notes.explanations())


def test_a_folder_without_words_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_store(tmp_path / "store")
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "has no vocabulary: inspect again where the model's tokenizer is" in capsys.readouterr().err
