"""Embedding: are the latent's windows nearer to the explanation than silent ones, by the cosine of their embeddings.

The value is the area under the curve of the cosine, active windows against silent ones. No chat model is asked.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stage_inspect.explain import marks
from stage_inspect.explain.endpoint.request import Failure, Request, embedding, vectors_of
from stage_inspect.explain.examples import Tested
from stage_inspect.explain.scores.measure import Judgement, Result, auc, auc_of, counts, figure, unread
from stage_inspect.explain.scores.scorer import Answers, Case, NotPossibleError, said

INSTRUCTION = "Find texts that hold this pattern: "
PER_REQUEST = 25


@dataclass
class Embedding:
    """Questions of one latent."""

    case: Case

    @property
    def record(self) -> dict[str, Any]:
        return {"instruction": INSTRUCTION, "embedding_model": self.case.judge.embedding_model}

    @cached_property
    def texts(self) -> list[list[Tested]]:
        """The texts of each request."""
        tested = self.case.texts.tested
        return [tested[start : start + PER_REQUEST] for start in range(0, len(tested), PER_REQUEST)]

    def requests(self, explanation: str) -> list[Request]:
        url, model = self.case.judge.url, self.case.judge.embedding_model
        if model is None:
            raise NotPossibleError("it needs a model of embeddings: --embedding-model")
        asked = [embedding(url, model, [INSTRUCTION + said(explanation)])]
        return asked + [embedding(url, model, [marks.plain(one.example) for one in some]) for some in self.texts]

    def score(self, answers: Answers) -> Result:
        query = None if isinstance(answers[0], Failure) else vectors_of(answers[0])[0]
        judged: list[Judgement] = []
        for some, answer in zip(self.texts, answers[1:], strict=True):
            found = [None] * len(some) if isinstance(answer, Failure) else vectors_of(answer)
            for one, vector in zip(some, found if len(found) == len(some) else [None] * len(some), strict=True):
                near = cosine(query, vector) if query is not None and vector is not None else None
                is_said = None if near is None else near > 0
                judged.append(Judgement(one.is_active, is_said, one, near, "no vector", near is None))
        sides = [np.array([o.certainty for o in judged if o.truth == t and o.certainty is not None]) for t in (1, 0)]
        details = {"counts": counts(judged), "unread": unread(judged)}
        if not all(map(len, sides)):
            return Result(None, details={"why": "no vectors could be had", **details})
        whole = figure(auc_of, sides[0], sides[1])
        by_quantile = [
            {
                "quantile": q,
                "value": auc(
                    np.array([o.certainty for o in judged if o.of.quantile == q and o.said is not None]), sides[1]
                ),
            }
            for q in sorted({o.of.quantile for o in judged if o.of.quantile is not None and o.said is not None})
        ]
        return Result(whole["value"], whole["low"], whole["high"], {"by_quantile": by_quantile, **details})


def cosine(x: list[float], y: list[float]) -> float | None:
    """Compute that of two vectors; None where they have no angle."""
    if len(x) != len(y):
        return None
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.dot(x, y)) / norm if norm > 0 else None
