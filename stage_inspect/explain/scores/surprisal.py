"""Surprisal: does the explanation make the latent's windows likelier than it makes silent ones.

Of each text the mean log probability of its tokens behind the explanation, minus that behind a neutral line. The value
is the area under the curve of the difference, active windows against silent ones. It needs ``completions`` with
``echo``, which gives the log probabilities of a text that was read.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from stage_inspect.explain import marks
from stage_inspect.explain.endpoint.request import Failure, Request, echo, read_tokens_or_none
from stage_inspect.explain.scores.measure import Judgement, Result, auc_of, counts, figure, unread
from stage_inspect.explain.scores.scorer import NO_LOGPROBS, Answers, Case, NotPossibleError, said

BEFORE = "The following is a text with this pattern: {}\n\n"
NEUTRAL = "The following is a text.\n\n"


@dataclass
class Surprisal:
    """Questions of one latent."""

    case: Case

    @property
    def record(self) -> dict[str, Any]:
        return {"before": BEFORE, "neutral": NEUTRAL}

    @cached_property
    def texts(self) -> list[str]:
        return [marks.plain(one.example) for one in self.case.texts.tested]

    def requests(self, explanation: str) -> list[Request]:
        judge = self.case.judge
        if not judge.logprobs:
            raise NotPossibleError(NO_LOGPROBS)
        prefixes = (BEFORE.format(said(explanation)), NEUTRAL)
        return [echo(judge.url, judge.model, prefix + text) for text in self.texts for prefix in prefixes]

    def score(self, answers: Answers) -> Result:
        judged = []
        for number, one in enumerate(self.case.texts.tested):
            pair = answers[2 * number : 2 * number + 2]
            text = self.texts[number]
            means = [mean_logprob(answer, text) for answer in pair]
            told = [mean for mean in means if isinstance(mean, Failure)]
            gain = None if told else float(means[0]) - float(means[1])  # type: ignore[arg-type]
            judged.append(
                Judgement(
                    one.is_active, None if gain is None else gain > 0, one, gain,
                    told[0].reason if told else None, bool(told) and told[0].is_endpoints,
                )
            )  # fmt: skip
        sides = [np.array([o.certainty for o in judged if o.truth == t and o.certainty is not None]) for t in (1, 0)]
        details = {"counts": counts(judged), "unread": unread(judged)}
        if not all(map(len, sides)):
            return Result(None, details={"why": NO_LOGPROBS, **details})
        whole = figure(auc_of, sides[0], sides[1])
        return Result(whole["value"], whole["low"], whole["high"], details)


def mean_logprob(answer: str | Failure, text: str) -> float | Failure:
    """Mean log probability of the tokens of an echo that lie in `text`, which the prompt ended with."""
    told = echoed(answer)
    if isinstance(told, Failure):
        return told
    tokens, end = told
    inside = [value for place, value in tokens if place >= end - len(text)]
    return float(np.mean(inside)) if inside else Failure(NO_LOGPROBS, is_endpoints=False)


def echoed(answer: str | Failure) -> tuple[list[tuple[int, float]], int] | Failure:
    """(place, log probability) of the tokens of a prompt, and where the prompt ends.

    One token was written behind it: it begins where the prompt ends, and is left out.
    """
    if isinstance(answer, Failure):
        return answer
    try:
        tokens = read_tokens_or_none(answer)
    except GranaryError:
        tokens = None
    if tokens is None:
        return Failure(NO_LOGPROBS, is_endpoints=False)
    end = tokens[-1][0]
    return [token for token in tokens if token[0] < end], end
