"""What a rule may say of a token, as a text and as a record.

A rule is a conjunction of at most `MOST` conditions, each on something else: the token is one of a set, or begins or
ends in some letters; the token before it, or the one behind it, is one of a set; a label holds or does not (a lexical
class, a regular expression about the surroundings, a position, a concept of Python; see `labels`). A rule without
conditions says yes to every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shared.latents.vocabulary import Vocabulary
from stage_inspect.scan.pairs import Ints

MOST = 3  # conditions of a rule
MOST_TOKENS = 16  # tokens of a set

Channel = Literal["token", "previous", "next"]
CHANNELS: tuple[Channel, ...] = ("token", "previous", "next")
SAID = {"token": "token is", "previous": "after", "next": "before"}


@dataclass(frozen=True)
class OneOf:
    """The token, the one before it, or the one behind it, is one of these."""

    channel: Channel
    ids: tuple[int, ...]
    """The most telling first."""

    @property
    def subject(self) -> str:
        """What it is about: a rule has one condition on each."""
        return self.channel

    def text(self, vocabulary: Vocabulary) -> str:
        """Return the condition for people."""
        shown = [repr(vocabulary.text_of(token)) for token in self.ids]
        return f"{SAID[self.channel]} {either(shown)}"

    def record(self) -> dict[str, Any]:
        """Return the condition for machines."""
        return {self.channel: list(self.ids)}


@dataclass(frozen=True)
class Affix:
    """The token's text begins, or ends, in these letters; spaces around it do not count."""

    letters: str
    where: Literal["begins", "ends"]
    ids: tuple[int, ...]
    """Every token of the vocabulary that does."""

    channel: Channel = "token"

    @property
    def subject(self) -> str:
        """What it is about: a rule has one condition on each."""
        return self.channel

    def text(self, vocabulary: Vocabulary) -> str:
        """Return the condition for people."""
        return f"token {'starts with' if self.where == 'begins' else 'ends in'} {self.letters!r}"

    def record(self) -> dict[str, Any]:
        """Return the condition for machines, as a regular expression would say it."""
        return {self.where: self.letters}


@dataclass(frozen=True)
class Labelled:
    """A label holds, or does not."""

    label: int
    """Its number among those of the search."""
    name: str
    said: str
    is_true: bool = True

    @property
    def subject(self) -> str:
        """What it is about: a rule has one condition on each."""
        return self.name

    def text(self, vocabulary: Vocabulary) -> str:
        """Return the condition for people."""
        return self.said if self.is_true else f"not {self.said}"

    def record(self) -> dict[str, Any]:
        """Return the condition for machines."""
        return {"label": self.name, "is": self.is_true}


Condition = OneOf | Affix | Labelled


@dataclass(frozen=True)
class Rule:
    """A predicate on tokens."""

    conditions: tuple[Condition, ...] = ()

    def text(self, vocabulary: Vocabulary) -> str:
        """One line for people: sets of tokens first, as a reader would ask."""
        order = {"token": 0, "previous": 1, "next": 2}
        parts = sorted(self.conditions, key=lambda one: order.get(one.subject, 3))
        return "; ".join(one.text(vocabulary) for one in parts) or "any token"

    def record(self) -> list[dict[str, Any]]:
        """The conditions as JSON; all of them must hold."""
        return [one.record() for one in self.conditions]

    def has(self, subject: str) -> bool:
        """Whether one of its conditions is about this."""
        return any(one.subject == subject for one in self.conditions)

    def holds(self, channels: dict[Channel, Ints], labels_NJ: Any, size: int) -> Any:
        """Whether it holds, bool [N], of tokens whose ids, neighbours' ids and labels these are.

        `size`: of the vocabulary; -1, where there is no neighbour, is in no set.
        """
        import numpy as np

        found = np.ones(len(labels_NJ), bool)
        for one in self.conditions:
            if isinstance(one, Labelled):
                found &= labels_NJ[:, one.label].astype(bool) == one.is_true
            else:
                found &= members(one.ids, size)[channels[one.channel]]
        return found


def members(ids: Sequence[int], size: int) -> Any:
    """bool [size + 1]: which ids are in a set; the last, index -1, is in none."""
    import numpy as np

    found = np.zeros(size + 1, bool)
    found[list(ids)] = True
    return found


def either(shown: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
