"""A search from its question to the notes, the same for the command and for the explorer's page."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.store.choose import choose_contexts
from stage_inspect.concepts.labels import parse
from stage_inspect.concepts.question import Question
from stage_inspect.concepts.search import Inspected, Result, search


class Finding:
    """A question that can be answered: latents folder, store, dictionary and concepts are there."""

    def __init__(self, url: str, sae: str | None, store: str | None, question: Question) -> None:
        """`sae` and `store` are None where they lie as the folder says; raises GranaryError for every wrong input."""
        if question.count < 1:
            raise GranaryError(f"--count {question.count}: at least 1")
        self._question = question
        self._latents = Latents.open(url)
        self._inspected = Inspected.open(self._latents, sae, store)
        self._concepts = parse(
            question.python, question.regex, question.token, self._inspected.vocabulary, question.spans
        )
        self._contexts = choose_contexts(self._inspected.store, question.split, question.contexts)

    @property
    def store_url(self) -> str:
        """Where the tokens are read."""
        return self._inspected.store.url

    @property
    def tokens(self) -> int:
        """Tokens that the pass reads."""
        return len(self._contexts) * self._inspected.store.seq_len

    def run(self, tell: Callable[[int], None]) -> Result:
        """The pass; `tell` gets the number of tokens of each batch. Raises GranaryError where nothing can be found."""
        return search(self._inspected, self._concepts, self._contexts, self._question.count, tell)

    def keep(self, result: Result) -> None:
        """Put what was found into the notes, where they can be written."""
        notes = self._latents.notes
        if not notes.writable:
            return
        for name, rows in records(result).items():
            kept = {
                "split": self._question.split.value,
                "contexts": len(self._contexts),
                "documents": list(result.documents),
                "latents": rows,
            }
            notes.add_concept(name, self._concepts.definitions[name], kept)


def records(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The latents of each concept with their scores, as JSON holds them."""
    return {name: [asdict(one) for one in matches] for name, matches in result.matches.items()}
