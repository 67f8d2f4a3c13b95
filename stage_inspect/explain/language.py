"""Explanations by a language model, and scores: which latents, in what order, and what is there already.

Everything is written as soon as it is known. What the notes hold is not made again: an explanation of the same request,
a score of the same settings, unless the endpoint failed in it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shared.basics.errors import GranaryError
from shared.basics.files import lock_folder
from shared.latents.folder import Latents
from shared.latents.notes import Explanation
from shared.store.io.local import LocalIO
from stage_inspect.explain.endpoint.client import Asker
from stage_inspect.explain.endpoint.request import Failure, text_of
from stage_inspect.explain.examples import Chosen, choose
from stage_inspect.explain.explainers import details, explanation_in, question
from stage_inspect.explain.pictures import ChosenPictures, choose_pictures
from stage_inspect.explain.scores.all import PICTURES, SCORERS, scored
from stage_inspect.explain.scores.measure import Result
from stage_inspect.explain.scores.scorer import Case, Judge
from stage_inspect.explain.sides import Sides
from stage_inspect.explain.steering import Steering

AT_ONCE = 64  # latents whose explanations are asked for together


@dataclass(frozen=True)
class Plan:
    """What one command does."""

    latents: Latents
    numbers: Sequence[int]
    judge: Judge
    sides: Sides
    num_train: int
    num_test: int
    steering: Steering | None = None


@contextmanager
def alone(latents: Latents) -> Iterator[None]:
    """Hold the folder: two at once would pay twice. Raises GranaryError where it can't be written, or is held."""
    if not isinstance(latents.io, LocalIO):
        raise GranaryError("explanations are written into the folder: copy it to this machine first")
    held = lock_folder(latents.io.root)
    if held is None:
        raise GranaryError(f"another command is writing {latents.url}: let it finish, or stop it")
    try:
        yield
    finally:
        os.close(held)


def explain(plan: Plan, explainer: str, asker: Asker, tell: Callable[[int], None]) -> dict[int, str]:
    """Ask for an explanation of each latent that has none of this request; returns those left out, and why."""
    latents, judge = plan.latents, plan.judge
    there = {one.details.get("request") for one in latents.notes.explanations()}
    left_out: dict[int, str] = {}
    for start in range(0, len(plan.numbers), AT_ONCE):
        some = plan.numbers[start : start + AT_ONCE]
        asked = []
        for chosen in (examples_of(plan, number, pictures=explainer == "pictures") for number in some):
            if chosen.why_not_explained is not None:
                left_out[chosen.latent] = chosen.why_not_explained
                continue
            request = question(latents, chosen, explainer, judge.url, judge.model)
            if request.sha256 not in there:
                asked.append((chosen, request))
        answers = asker.ask([request for _, request in asked])
        rows = []
        for (chosen, request), answer in zip(asked, answers, strict=True):
            text = None if isinstance(answer, Failure) else explanation_in(text_of(answer))
            if text is None:
                reason = answer.reason if isinstance(answer, Failure) else "the answer has no line [EXPLANATION]:"
                left_out[chosen.latent] = f"failed: {reason}"
                continue
            kept = details(chosen, explainer, request, plan.sides.seed, plan.sides.unit)
            rows.append((chosen.latent, text, explainer, judge.model, kept))
        latents.notes.add_explanations(rows)
        tell(len(some))
    return left_out


def score(
    plan: Plan, method: str, author: str | None, names: Sequence[str], asker: Asker, tell: Callable[[int], None]
) -> int:
    """Score the newest explanation of this method (and author) of each latent; returns how many scores were added."""
    notes = plan.latents.notes
    newest: dict[int, Explanation] = {}
    for one in notes.explanations():
        if one.method == method and author in (None, one.author):
            newest[one.latent] = one
    added = 0
    for number in plan.numbers:
        own = newest.get(number)
        if own is not None:
            cases = {
                pictures: Case(examples_of(plan, number, pictures=pictures), plan.judge, plan.steering, plan.latents)
                for pictures in {name == PICTURES for name in names}
            }
            other = shuffled(newest, number)
            for name in names:
                case = cases[name == PICTURES]
                settings = settings_of(plan, SCORERS[name](case).record, name, own, other)
                if any(is_done(one.scorer, one.details, name, settings) for one in notes.scores(own.id)):
                    continue
                result = scored(name, case, asker, own.text, other)
                notes.add_score(own.id, name, *ends(result), recorded(plan, settings, result))
                added += 1
        tell(1)
    return added


def examples_of(plan: Plan, number: int, *, pictures: bool) -> Chosen | ChosenPictures:
    """The examples of one latent: texts or pictures."""
    if pictures:
        return choose_pictures(plan.latents, number, plan.sides, plan.num_train, plan.num_test)
    return choose(plan.latents, number, plan.sides, plan.num_train, plan.num_test)


def shuffled(explanations: dict[int, Explanation], number: int) -> str | None:
    """An explanation of another latent with another text: the next in a fixed order by chance. None: there is none."""
    order = sorted(explanations, key=lambda latent: hashlib.sha256(str(latent).encode()).digest())
    at = order.index(number)
    for latent in order[at + 1 :] + order[:at]:
        if explanations[latent].text != explanations[number].text:
            return explanations[latent].text
    return None


def settings_of(plan: Plan, record: dict[str, Any], name: str, own: Explanation, other: str | None) -> str:
    """A hash of what decides a score beside the code: the same again is not asked again."""
    judge = plan.judge
    decides: list[Any] = [record, name, own.text, other, judge.url, judge.model, judge.logprobs, judge.embedding_model]
    decides += [plan.sides.seed, plan.sides.unit, plan.num_train, plan.num_test]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def is_done(scorer: str, details: dict[str, Any], name: str, settings: str) -> bool:
    """Whether a score is this one, and no request of it is worth asking again."""
    unread = details.get("unread")
    again = isinstance(unread, list) and any(isinstance(one, dict) and one.get("again") for one in unread)
    return scorer == name and details.get("settings") == settings and not again


def ends(result: Result) -> tuple[float | None, float | None, float | None]:
    """The score with its interval."""
    return result.value, result.low, result.high


def recorded(plan: Plan, settings: str, result: Result) -> dict[str, Any]:
    """What is kept beside a score."""
    judge, sides, seq_len = plan.judge, plan.sides, plan.latents.meta.seq_len
    details = dict(result.details)
    if "failed" in details:
        details["failed"] = [{**one, "place": one["place"][0] * seq_len + one["place"][1]} for one in details["failed"]]
    return {"judge": judge.model, "seed": sides.seed, "apart": sides.unit, "settings": settings, **details}
