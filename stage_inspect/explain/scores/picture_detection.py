"""Detection on pictures: is the pattern in this image. Held-out images on which the latent fires, and others.

Several images are judged in one question, without any mark on them; the answers are read as those of `yes_or_no`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stage_inspect.explain.endpoint.request import Request, chat
from stage_inspect.explain.pictures import TestedPicture, listed, text_part
from stage_inspect.explain.prompts.files import Prompt
from stage_inspect.explain.scores.measure import Result, classified
from stage_inspect.explain.scores.scorer import NO_LOGPROBS, Answers, Case, said
from stage_inspect.explain.scores.yes_or_no import PER_QUESTION, TOKENS_PER_TEXT, Judged, judgements


@dataclass
class PictureDetection:
    """The score of one latent."""

    case: Case

    @cached_property
    def prompt(self) -> Prompt:
        return Prompt.read("picture_detection")

    @property
    def record(self) -> dict[str, Any]:
        return {**self.prompt.record, "per_question": PER_QUESTION}

    @cached_property
    def questions(self) -> list[list[TestedPicture]]:
        """The pictures of each question."""
        tested = self.case.pictures.tested
        return [tested[start : start + PER_QUESTION] for start in range(0, len(tested), PER_QUESTION)]

    def requests(self, explanation: str) -> list[Request]:
        found, judge = [], self.case.judge
        assert self.case.latents is not None
        for some in self.questions:
            system, user = self.prompt.filled(count=len(some), explanation=said(explanation))
            parts = [text_part(user), *listed(self.case.latents, [one.picture for one in some])]
            most = 16 + TOKENS_PER_TEXT * len(some)
            found.append(chat(judge.url, judge.model, system, parts, max_tokens=most, logprobs=judge.logprobs))
        return found

    def score(self, answers: Answers) -> Result:
        judged = []
        for some, answer in zip(self.questions, answers, strict=True):
            judged += judgements([Judged(one.is_active, one) for one in some], answer)
        return classified(judged, NO_LOGPROBS)
