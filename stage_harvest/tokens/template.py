"""Chats to text by the tokenizer's chat template, and what besides the messages decides that text.

A template may write today's date, and it may read variables. Both are part of what a store's tokens are made from, so
the renderer fixes them, and says what they were.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus import Chat

# What a template calls to learn the time.
CLOCK = re.compile(r"\bstrftime_now\b")


@dataclass(slots=True)
class ChatRenderer:
    """A tokenizer's template at a fixed date, with fixed variables."""

    tokenizer: PreTrainedTokenizerBase
    today: date
    variables: Mapping[str, Any] = field(default_factory=dict)
    used: bool = field(default=False, init=False)
    """Whether a chat has become part of the tokens: only then does the template belong to their identity."""

    @property
    def template(self) -> str:
        """The template's source; raises GranaryError where the tokenizer has none."""
        if self.tokenizer.chat_template is None:
            raise GranaryError("the corpus holds chat messages, but the model's tokenizer has no chat template")
        return str(self.tokenizer.get_chat_template())

    def render(self, chat: Chat, where: str) -> str:
        """The text of `chat`; raises GranaryError naming `where` for messages that the template can't take."""
        _ = self.template
        midnight = datetime.combine(self.today, datetime.min.time())
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages, tokenize=False, strftime_now=midnight.strftime, **self.variables
            )
        except Exception as error:  # the template is a program, and may fail in any way
            kind = type(error).__name__
            raise GranaryError(f"{where}: the chat template fails on it ({kind}: {first_line(error)})") from error
        return str(text)

    def identity(self) -> dict[str, Any]:
        """JSON for a store's plan: the template's hash, its variables, and the date where the template asks for it."""
        record: dict[str, Any] = {"template_hash": hashlib.sha256(self.template.encode()).hexdigest()}
        if self.variables:
            record["variables"] = dict(self.variables)
        if CLOCK.search(self.template):
            record["date"] = self.today.isoformat()
        return record
