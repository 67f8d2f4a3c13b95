"""The scorers by name, and one explanation's score beside its two controls."""

from collections.abc import Callable
from typing import Any

from stage_inspect.explain.endpoint.client import Asker
from stage_inspect.explain.scores.embedding import Embedding
from stage_inspect.explain.scores.intervention import Intervention
from stage_inspect.explain.scores.intruder import Intruder
from stage_inspect.explain.scores.measure import Result
from stage_inspect.explain.scores.picture_detection import PictureDetection
from stage_inspect.explain.scores.scorer import Case, NotPossibleError, Scorer
from stage_inspect.explain.scores.simulation import Simulation
from stage_inspect.explain.scores.surprisal import Surprisal
from stage_inspect.explain.scores.yes_or_no import YesOrNo

PICTURES = "picture_detection"
"""The score whose examples are pictures."""
SCORERS: dict[str, Callable[[Case], Scorer]] = {
    "detection": lambda case: YesOrNo(case, "detection"),
    "fuzzing": lambda case: YesOrNo(case, "fuzzing"),
    "fuzzing_active": lambda case: YesOrNo(case, "fuzzing_active"),
    "intruder": Intruder,
    "simulation": Simulation,
    "embedding": Embedding,
    "surprisal": Surprisal,
    "intervention": Intervention,
    PICTURES: PictureDetection,
}
DEFAULT = ("detection", "fuzzing", "fuzzing_active")


def scored(name: str, case: Case, asker: Asker, explanation: str, other: str | None) -> Result:
    """The score of an explanation, with those of `other` (of another latent) and of none in ``details.controls``."""
    reason = case.chosen.why_not_tested
    if reason is not None:
        return Result.missing(reason)
    scorer = SCORERS[name](case)
    texts = {"own": explanation, "shuffled": other, "empty": ""}
    try:
        asked = {which: scorer.requests(text) for which, text in texts.items() if text is not None}
        answers = asker.ask([request for requests in asked.values() for request in requests])
        results: dict[str, Result] = {}
        for which, requests in asked.items():
            own, answers = answers[: len(requests)], answers[len(requests) :]
            results[which] = scorer.score(own)
    except NotPossibleError as error:
        return Result.missing(str(error))
    missing = Result.missing("no other latent has an explanation")
    controls = {which: results.get(which, missing).brief for which in ("shuffled", "empty")}
    controls["shuffled"] |= {"text": other} if other is not None else {}
    found = results["own"]
    details: dict[str, Any] = {**found.details, "controls": controls, **scorer.record}
    return Result(found.value, found.low, found.high, details)
