"""Simulation: predict the latent's strength at every token from the explanation (Bills et al. 2023).

The model writes a list of whole numbers, 0 to 10, one for each token. A prediction is the expected number over what
could have stood in its place, sum of v p(v) over sum of p(v); the number itself where the endpoint gives no log
probabilities (``values`` says which). The value is Pearson's correlation with the true activations over the
concatenation of all windows, silent ones too; None where either is constant.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stage_inspect.explain.endpoint.request import Failure, Request, Token, chat, text_of, written_tokens
from stage_inspect.explain.examples import Tested
from stage_inspect.explain.prompts.files import Prompt
from stage_inspect.explain.scores.measure import RESAMPLES, Doubles, Judgement, Result, counts, pearson, unread
from stage_inspect.explain.scores.scorer import NO_LOGPROBS, Answers, Case, said
from stage_inspect.explain.scores.yes_or_no import listed_numbers

LARGEST = 10
PER_TOKEN = 4  # tokens of an answer


@dataclass
class Simulation:
    """Questions of one latent."""

    case: Case

    @cached_property
    def prompt(self) -> Prompt:
        return Prompt.read("simulation")

    @property
    def record(self) -> dict[str, Any]:
        return self.prompt.record

    def requests(self, explanation: str) -> list[Request]:
        found, judge = [], self.case.judge
        for one in self.case.texts.tested:
            strings = one.example.strings
            listed = "\n".join(f"{number}. {text!r}" for number, text in enumerate(strings, 1))
            system, user = self.prompt.filled(count=len(strings), explanation=said(explanation), tokens=listed)
            most = 16 + PER_TOKEN * len(strings)
            found.append(chat(judge.url, judge.model, system, user, max_tokens=most, logprobs=judge.logprobs))
        return found

    def score(self, answers: Answers) -> Result:
        predicted: list[tuple[Tested, Doubles]] = []
        judged, is_expected = [], True
        for one, answer in zip(self.case.texts.tested, answers, strict=True):
            count = len(one.example.values)
            numbers = None if isinstance(answer, Failure) else listed_numbers(text_of(answer), count, LARGEST)
            failure = (
                answer if isinstance(answer, Failure) else Failure("the answer is no list of a number per token", False)
            )
            judged.append(
                Judgement(
                    one.is_active, None if numbers is None else one.is_active, one,
                    reason=failure.reason if numbers is None else None, is_endpoints=failure.is_endpoints,
                )
            )  # fmt: skip
            if numbers is not None and not isinstance(answer, Failure):
                better = expected(written_tokens(answer), numbers)
                is_expected &= better is not None
                predicted.append((one, np.array(numbers if better is None else better, float)))
        details: dict[str, Any] = {"counts": counts(judged), "unread": unread(judged)}
        if not predicted:
            return Result(None, details={"why": "no answer could be read", **details})
        details["values"] = "expected" if is_expected else f"as written: {NO_LOGPROBS}"
        details["by_quantile"] = [
            {"quantile": quantile, "value": finite(together([p for p in predicted if p[0].quantile == quantile]))}
            for quantile in sorted({one.quantile for one, _ in predicted if one.quantile is not None})
        ]
        value = finite(together(predicted))
        if value is None:
            return Result(None, details={"why": "the predictions, or the activations, are all equal", **details})
        low, high = drawn_again(predicted)
        return Result(value, low, high, details)


def together(predicted: list[tuple[Tested, Doubles]]) -> float:
    """Pearson over all tokens of these windows."""
    truth = np.concatenate([one.example.values.astype(np.float64) for one, _ in predicted])
    return pearson(truth, np.concatenate([guess for _, guess in predicted]))


def drawn_again(predicted: list[tuple[Tested, Doubles]]) -> tuple[float | None, float | None]:
    """Bootstrap interval over windows."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(predicted), len(predicted)) for _ in range(RESAMPLES // 5))
    values = [value for draw in draws if math.isfinite(value := together([predicted[number] for number in draw]))]
    if not values:
        return None, None
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def expected(tokens: list[Token] | None, numbers: list[int]) -> list[float] | None:
    """The expected number at each place; None where the numbers are not tokens of their own."""
    found = [token for token in tokens or [] if token.text.strip(" ,[]\n").isdigit()][-len(numbers) :]
    if [int(token.text.strip(" ,[]\n")) for token in found] != numbers:
        return None
    means = []
    for token in found:
        chances: dict[int, float] = {}
        for text, logprob in ({token.text: token.logprob} | token.others).items():
            digits = text.strip(" ,[]\n")
            if digits.isascii() and digits.isdigit() and int(digits) <= LARGEST:
                chances[int(digits)] = chances.get(int(digits), 0.0) + math.exp(min(0.0, logprob))
        total = sum(chances.values())
        if not total > 0:
            return None
        means.append(sum(value * chance for value, chance in chances.items()) / total)
    return means


def finite(value: float) -> float | None:
    """None for NaN."""
    return value if math.isfinite(value) else None
