"""Intruder detection: of five texts, four in which the latent fires and one in which it is silent, name it.

It needs no explanation: it says how plain a latent's pattern is, and stands beside every explanation of it. The four
are neighbours by rank. The value is the share that was right, to be compared with chance, 1 in 5 (details).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stage_inspect.explain import marks
from stage_inspect.explain.endpoint.request import Failure, Request, chat
from stage_inspect.explain.examples import Tested
from stage_inspect.explain.prompts.files import Prompt
from stage_inspect.explain.scores.measure import Judgement, Result, unread, wilson
from stage_inspect.explain.scores.scorer import Answers, Case, NotPossibleError
from stage_inspect.explain.scores.yes_or_no import whole_number

TEXTS = 5
ANSWER_TOKENS = 16


@dataclass
class Intruder:
    """Questions of one latent."""

    case: Case

    @cached_property
    def prompt(self) -> Prompt:
        return Prompt.read("intruder")

    @property
    def record(self) -> dict[str, Any]:
        return {**self.prompt.record, "texts": TEXTS}

    @cached_property
    def questions(self) -> list[tuple[list[Tested], int]]:
        """(texts, place of the intruder) of each question: as many as there are fours of neighbours by rank."""
        rng = np.random.default_rng([self.case.chosen.latent, TEXTS])
        found: list[tuple[list[Tested], int]] = []
        by_rank = sorted(self.case.texts.active, key=lambda one: one.quantile or 0)
        silent = self.case.texts.silent
        for start in range(0, len(by_rank) - TEXTS + 2, TEXTS - 1):
            place = int(rng.integers(TEXTS))
            texts = by_rank[start : start + TEXTS - 1]
            texts.insert(place, silent[len(found) % len(silent)])
            found.append((texts, place))
        if not found:
            raise NotPossibleError(f"fewer than {TEXTS - 1} windows in which it fires")
        return found

    def requests(self, explanation: str) -> list[Request]:
        """Equal for every explanation, so they are asked once."""
        found, judge = [], self.case.judge
        for texts, _ in self.questions:
            listed = "\n\n".join(f"Excerpt {number}: {marks.plain(one.example)}" for number, one in enumerate(texts, 1))
            system, user = self.prompt.filled(count=TEXTS, texts=listed)
            found.append(chat(judge.url, judge.model, system, user, max_tokens=ANSWER_TOKENS))
        return found

    def score(self, answers: Answers) -> Result:
        judged, missing = [], []
        for (texts, place), answer in zip(self.questions, answers, strict=True):
            intruder = texts[place]
            number = None if isinstance(answer, Failure) else whole_number(answer, 1, TEXTS)
            if number is not None:
                judged.append(number - 1 == place)
                continue
            failure = answer if isinstance(answer, Failure) else Failure("the answer is no number of a text", False)
            missing.append(Judgement(False, None, intruder, reason=failure.reason, is_endpoints=failure.is_endpoints))
        details = {
            "chance": 1 / TEXTS,
            "counts": {"questions": len(answers), "unread": len(missing)},
            "unread": unread(missing),
        }
        if not judged:
            return Result(None, details={"why": "no answer could be read", **details})
        return Result(sum(judged) / len(judged), *wilson(sum(judged), len(judged)), details)
