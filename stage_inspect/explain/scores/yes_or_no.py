"""Detection and fuzzing: is the pattern in this text; do the marks stand where it is (after EleutherAI's delphi).

detection        the latent's windows and silent ones, without marks
fuzzing          marks: in the latent's windows where it fires, in silent windows at random, as many and as long
fuzzing_active   marks: in the latent's windows where it fires, and in the same windows where it does not

Wrong marks are drawn for each text anew. Several texts are judged in one question; an answer that is no list of as
many numbers is a failure of all of them, not a zero. A certainty is P("1") / (P("0") + P("1")) at the number's token.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from stage_inspect.explain import marks
from stage_inspect.explain.endpoint.request import Failure, Request, Token, chat, text_of, written_tokens
from stage_inspect.explain.examples import Tested
from stage_inspect.explain.pictures import TestedPicture
from stage_inspect.explain.prompts.files import Prompt
from stage_inspect.explain.scores.measure import Judgement, Result, classified
from stage_inspect.explain.scores.scorer import NO_LOGPROBS, Answers, Case, NotPossibleError, said

PER_QUESTION = 5
TOKENS_PER_TEXT = 8  # of an answer


@dataclass(frozen=True)
class Judged:
    """What is to be judged, and the truth."""

    truth: bool
    of: Tested | TestedPicture


@dataclass(frozen=True)
class Text(Judged):
    """The same as a text."""

    text: str


@dataclass
class YesOrNo:
    """One of the three forms."""

    case: Case
    form: str

    @cached_property
    def prompt(self) -> Prompt:
        return Prompt.read("detection" if self.form == "detection" else "fuzzing")

    @property
    def record(self) -> dict[str, Any]:
        return {**self.prompt.record, "highlight": marks.CONVENTIONS["tests"], "per_question": PER_QUESTION}

    @cached_property
    def questions(self) -> list[list[Text]]:
        """The texts of each question."""
        texts = {"detection": unmarked, "fuzzing": marked, "fuzzing_active": marked_active}[self.form](self.case)
        return [texts[start : start + PER_QUESTION] for start in range(0, len(texts), PER_QUESTION)]

    def requests(self, explanation: str) -> list[Request]:
        found = []
        for texts in self.questions:
            listed = "\n\n".join(f"Excerpt {number}: {one.text}" for number, one in enumerate(texts, 1))
            system, user = self.prompt.filled(count=len(texts), explanation=said(explanation), texts=listed)
            judge, most = self.case.judge, 16 + TOKENS_PER_TEXT * len(texts)
            found.append(chat(judge.url, judge.model, system, user, max_tokens=most, logprobs=judge.logprobs))
        return found

    def score(self, answers: Answers) -> Result:
        judged = []
        for texts, answer in zip(self.questions, answers, strict=True):
            judged += judgements(texts, answer)
        return classified(judged, NO_LOGPROBS)


def judgements(texts: Sequence[Judged], answer: str | Failure) -> list[Judgement]:
    """What an answer says of each text of its question."""
    reason, is_endpoints, numbers = None, False, None
    certainties: Sequence[float | None] = [None] * len(texts)
    if isinstance(answer, Failure):
        reason, is_endpoints = answer.reason, answer.is_endpoints
    else:
        numbers = listed_numbers(text_of(answer), len(texts), 1)
        reason = None if numbers is not None else "the answer is no list of as many numbers as there were examples"
        tokens = written_tokens(answer)
        if numbers is not None and tokens is not None:
            certainties = certainty(tokens, numbers) or certainties
    return [
        Judgement(
            truth=one.truth,
            said=bool(numbers[place]) if numbers is not None else None,
            of=one.of,
            certainty=certainties[place],
            reason=reason,
            is_endpoints=is_endpoints,
        )
        for place, one in enumerate(texts)
    ]


def listed_numbers(text: str, count: int, largest: int) -> list[int] | None:
    """The one JSON list of `count` whole numbers of 0 to `largest` in a text; None where there is none, or several."""
    found = []
    for part in re.findall(r"\[[^\[\]]*\]", text):
        try:
            numbers = json.loads(part)
        except ValueError:
            continue
        if len(numbers) == count and all(type(one) is int and 0 <= one <= largest for one in numbers):
            found.append(numbers)
    return found[0] if len({tuple(one) for one in found}) == 1 else None


def certainty(tokens: Sequence[Token], numbers: Sequence[int]) -> list[float] | None:
    """P("1") / (P("0") + P("1")) at each number; None where the numbers are not tokens of their own.

    The list is what the answer ends with, so its numbers are the last tokens that are one of them.
    """
    places = [token for token in tokens if token.text.strip(" ,[]\n") in ("0", "1")][-len(numbers) :]
    if [int(token.text.strip(" ,[]\n")) for token in places] != list(numbers):
        return None
    found = []
    for token in places:
        chance = {"0": 0.0, "1": 0.0}
        for text, logprob in ({token.text: token.logprob} | token.others).items():
            if (key := text.strip(" ,[]\n")) in chance:
                chance[key] += math.exp(min(0.0, logprob))
        total = chance["0"] + chance["1"]
        if not total > 0:
            return None
        found.append(chance["1"] / total)
    return found


def unmarked(case: Case) -> list[Text]:
    """Texts of detection."""
    return [Text(one.is_active, one, marks.plain(one.example)) for one in case.texts.tested]


def marked(case: Case) -> list[Text]:
    """Texts of fuzzing: every one has marks. A silent one takes their number and lengths from an active one."""
    lengths = [marks.runs(marks.hot_pieces(one.example)) for one in case.texts.active]
    found, silent = [], 0
    for one in case.texts.tested:
        if one.is_active:
            found.append(Text(True, one, marks.marked(one.example, marks.hot_pieces(one.example))))
            continue
        nowhere = [False] * len(one.example.pieces)
        hot = marks.misplaced(nowhere, lengths[silent % len(lengths)], drawn(case, one))
        silent += 1
        if hot is not None:
            found.append(Text(False, one, marks.marked(one.example, hot)))
    return found


def marked_active(case: Case) -> list[Text]:
    """Texts of the other fuzzing: each active one twice, marked right and marked wrong."""
    right, wrong = [], []
    for one in case.texts.active:
        hot = marks.hot_pieces(one.example)
        elsewhere = marks.misplaced(marks.active_pieces(one.example), marks.runs(hot), drawn(case, one))
        if elsewhere is not None:
            right.append(Text(True, one, marks.marked(one.example, hot)))
            wrong.append(Text(False, one, marks.marked(one.example, elsewhere)))
    if not right:
        raise NotPossibleError("it fires on so much of its windows that no wrong mark has room")
    both = right + wrong
    return [both[number] for number in np.random.default_rng(case.chosen.latent).permutation(len(both))]


def drawn(case: Case, one: Tested) -> np.random.Generator:
    """Chance of its own for each latent and text."""
    return np.random.default_rng([case.chosen.latent, *one.place])


def whole_number(answer: str, smallest: int, largest: int) -> int | None:
    """The one whole number in an answer; None where there is none, several, or one out of bounds."""
    try:
        found = re.findall(r"(?<![\w.-])\d+(?![\w.]*\w)", text_of(answer))
    except GranaryError:
        return None
    numbers = {int(one) for one in found if len(one) < 9}
    return numbers.pop() if len(numbers) == 1 and smallest <= min(numbers) <= largest else None
