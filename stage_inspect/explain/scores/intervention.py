"""Intervention: does steering the latent make the model write what the explanation says (Paulo et al. 2024).

The model that was harvested goes on from the beginnings of texts in which the latent is silent, once with the latent
held at a large value and once without. The value is the mean over the beginnings of

    log p(explanation | steered text) - log p(explanation | clean text)

in nats, the sum over the explanation's tokens, as the judge has them. Its interval is a bootstrap over the beginnings.
It needs ``completions`` with ``echo``, and the model and the dictionary at hand.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stage_inspect.explain.endpoint.request import Failure, Request, echo
from stage_inspect.explain.scores.measure import ENDS, RESAMPLES, Result
from stage_inspect.explain.scores.scorer import NO_LOGPROBS, Answers, Case, NotPossibleError, said
from stage_inspect.explain.scores.surprisal import echoed
from stage_inspect.explain.steering import NoSteeringError, Pair, Steering

TEXTS = 20  # beginnings, at most
BEFORE = "A text:\n{}\n\nThe pattern that stands out in this text:"


@dataclass
class Intervention:
    """Questions of one latent."""

    case: Case

    @property
    def steering(self) -> Steering:
        assert self.case.steering is not None  # who asks for this score brings it
        return self.case.steering

    @property
    def record(self) -> dict[str, Any]:
        return {"before": BEFORE, "most_texts": TEXTS, **self.steering.record}

    @cached_property
    def pairs(self) -> list[Pair]:
        quiet = [one.example for one in self.case.texts.silent[:TEXTS]]
        try:
            return self.steering.pairs(self.case.chosen.latent, quiet)
        except NoSteeringError as error:
            raise NotPossibleError(str(error)) from None

    def requests(self, explanation: str) -> list[Request]:
        judge = self.case.judge
        if not judge.logprobs:
            raise NotPossibleError(NO_LOGPROBS)
        if not self.pairs:
            raise NotPossibleError("no silent window is long enough to begin a text with")
        behind = f" {said(explanation)}"
        return [echo(judge.url, judge.model, before(text) + behind) for pair in self.pairs for text in both(pair)]

    def score(self, answers: Answers) -> Result:
        gains: list[float] = []
        shown, unread = [], []
        for number, pair in enumerate(self.pairs):
            told = [chance(*one) for one in zip(answers[2 * number : 2 * number + 2], both(pair), strict=True)]
            failures = [one for one in told if isinstance(one, Failure)]
            unread += [{"text": number, "why": one.reason, "again": one.is_endpoints} for one in failures[:1]]
            steered, clean = told
            if not isinstance(steered, Failure) and not isinstance(clean, Failure):
                gains.append(steered - clean)
                shown.append({**asdict(pair), "gain": steered - clean})
        counts = {"texts": len(self.pairs), "unread": len(unread)}
        details: dict[str, Any] = {"counts": counts, "unread": unread, "unit": "nats", "texts_written": shown}
        if not gains:
            return Result(None, details={"why": unread[0]["why"], **details})
        drawn = np.random.default_rng(0).choice(gains, (RESAMPLES, len(gains)))
        low, high = np.quantile(drawn.mean(1), ENDS).tolist()
        return Result(float(np.mean(gains)), low, high, details)


def before(text: str) -> str:
    """What stands before the explanation."""
    return BEFORE.format(text)


def both(pair: Pair) -> tuple[str, str]:
    """The steered text and the clean one, in the order of the questions."""
    return pair.steered, pair.clean


def chance(answer: str | Failure, text: str) -> float | Failure:
    """log p(explanation | text) from the echo of both."""
    told = echoed(answer)
    if isinstance(told, Failure):
        return told
    inside = [value for place, value in told[0] if place >= len(before(text))]
    return sum(inside) if inside else Failure(NO_LOGPROBS, is_endpoints=False)
