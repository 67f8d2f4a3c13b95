"""Ask a language model what a latent responds to: the question, and what of the answer is an explanation.

``default`` shows where it fires, ``contrastive`` also where it is silent, ``logits`` also what it does to the next
token; ``pictures`` shows the pictures on which it fires. An answer without the line that was asked for is no
explanation: it is told as failed, and nothing is kept.
"""

import re
from typing import Any, Literal, get_args

from shared.latents.folder import Latents
from stage_inspect.explain import marks
from stage_inspect.explain.endpoint.request import Request, chat
from stage_inspect.explain.examples import Chosen
from stage_inspect.explain.pictures import CONVENTION, ChosenPictures, explained, text_part
from stage_inspect.explain.prompts.files import Prompt

Explainer = Literal["default", "contrastive", "logits", "pictures"]
EXPLAINERS: tuple[str, ...] = get_args(Explainer)

ANSWER_TOKENS = 500
LOGITS = 10  # next tokens listed at each end
LONGEST = 1000  # characters of an explanation
LINE = re.compile(r"^\W*EXPLANATION\W*:\**[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)


def question(latents: Latents, chosen: Chosen | ChosenPictures, explainer: str, url: str, model: str) -> Request:
    """The request for an explanation of one latent."""
    if isinstance(chosen, ChosenPictures):
        system, user = Prompt.read(explainer).filled(count=len(chosen.train))
        parts = [text_part(user), *explained(latents, chosen.train)]
        return chat(url, model, system, parts, max_tokens=ANSWER_TOKENS)
    largest = float(latents.table["max"][chosen.latent])
    shown = [
        f"Excerpt {number}: {marks.explained(one)}\nFires on: {marks.listed(one, largest)}"
        for number, one in enumerate(chosen.train, 1)
    ]
    values = {"examples": "\n\n".join(shown)}
    if explainer == "contrastive":
        values["silent"] = "\n\n".join(
            f"Excerpt {number}: {marks.plain(one)}" for number, one in enumerate(chosen.train_silent, 1)
        )
    if explainer == "logits":
        latent = latents.latent(chosen.latent)
        for name, weights in (("promoted", latent.promoted), ("demoted", latent.demoted)):
            values[name] = ", ".join(repr(one.text) for one in weights[:LOGITS]) or "not known"
    system, user = Prompt.read(explainer).filled(**values)
    return chat(url, model, system, user, max_tokens=ANSWER_TOKENS)


def explanation_in(text: str) -> str | None:
    """The explanation that an answer ends with; None where it has none."""
    lines = LINE.findall(text)
    found = lines[-1].strip(" \t*\"'") if lines else ""
    return found[:LONGEST] or None


def details(chosen: Chosen | ChosenPictures, explainer: str, request: Request, seed: int, unit: str) -> dict[str, Any]:
    """What an explanation was made from."""
    return {
        **Prompt.read(explainer).record,
        "request": request.sha256,
        "examples": [[one.context, one.position] for one in chosen.train],
        "highlight": CONVENTION if isinstance(chosen, ChosenPictures) else marks.CONVENTIONS["explainer"],
        "seed": seed,
        "apart": "image" if isinstance(chosen, ChosenPictures) else unit,
    }
