"""What every way to score has in common: what it is given, and the two halves that it is made of.

A scorer first says what it asks of one explanation, then makes a score of the answers. In between everything that all
explanations of a latent ask, its controls' too, goes to the endpoint at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from stage_inspect.explain.endpoint.request import Failure, Request
from stage_inspect.explain.examples import Chosen
from stage_inspect.explain.pictures import ChosenPictures
from stage_inspect.explain.scores.measure import Result
from stage_inspect.explain.steering import Steering

Answers = Sequence[str | Failure]

NO_LOGPROBS = "the endpoint gives no log probabilities"


@dataclass(frozen=True)
class Judge:
    """The model that judges, and where it is."""

    url: str
    model: str
    logprobs: bool = True
    """Whether to ask for log probabilities."""
    embedding_model: str | None = None


class Scorer(Protocol):
    """One way to score explanations of one latent."""

    @property
    def record(self) -> dict[str, Any]:
        """What decides the score beside the explanation: prompt, conventions."""

    def requests(self, explanation: str) -> list[Request]:
        """What to ask about an explanation, which is empty for one of the controls."""

    def score(self, answers: Answers) -> Result:
        """The score, from the answers in the order of the requests."""


@dataclass(frozen=True)
class Case:
    """A latent to be scored: its examples, the judge, and who steers the latent, for the score of that."""

    chosen: Chosen | ChosenPictures
    judge: Judge
    steering: Steering | None = None
    latents: Latents | None = None
    """The folder, which holds the pictures."""

    @property
    def texts(self) -> Chosen:
        """The examples of a score of texts."""
        assert isinstance(self.chosen, Chosen)
        return self.chosen

    @property
    def pictures(self) -> ChosenPictures:
        """The examples of a score of pictures."""
        assert isinstance(self.chosen, ChosenPictures)
        return self.chosen


def said(explanation: str) -> str:
    """An explanation as prompts hold it."""
    return explanation or "(no description)"


class NotPossibleError(GranaryError):
    """A score can't be had of this latent or with this endpoint: it is null, with this reason."""
