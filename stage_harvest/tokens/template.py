"""Chats to text by the tokenizer's chat template, and what besides the messages decides that text.

A template may write today's date, and it may read variables. Both are part of what a store's tokens are made from, so
the renderer fixes them, and says what they were.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cache
from string import ascii_letters
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus import Chat
from stage_harvest.tokens.assistant import Spans, has_generation_tags

# What a template calls to learn the time.
CLOCK = re.compile(r"\bstrftime_now\b")
# Before such a template, on its first line. A macro, since transformers from 5.24 on hands templates plain data alone:
# of the codes of strftime what they stand for.
FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- for part in format.split('%%') -%}"
    "{%- set told = namespace(text=part) -%}"
    "{%- for code, value in granary_clock.items() -%}"
    "{%- set told.text = told.text.replace(code, value) -%}"
    "{%- endfor -%}"
    "{{ '%' if not loop.first }}{{ told.text }}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
)


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
        return self._rendered(chat, where, None)

    def _rendered(self, chat: Chat, where: str, spans: Spans | None) -> str:
        template, variables = self.template, dict(self.variables)
        if CLOCK.search(template):
            template = FIXED_CLOCK + template
            variables["granary_clock"] = clock(self.today)
        try:
            if spans is None:
                return str(
                    self.tokenizer.apply_chat_template(
                        chat.messages, chat_template=template, tokenize=False, **variables
                    )
                )
            variables = {**self.tokenizer.special_tokens_map, **variables}
            made: Any = render_jinja_template(
                [chat.messages], chat_template=template, return_assistant_tokens_mask=True, **variables
            )
        except Exception as error:  # the template is a program, and may fail in any way
            kind = type(error).__name__
            raise GranaryError(f"{where}: the chat template fails on it ({kind}: {first_line(error)})") from error
        (text,), (found,) = made
        spans += found
        return str(text)

    def render_spans(self, chat: Chat, where: str) -> tuple[str, Spans]:
        """The text of `chat`, and which of its characters the template's generation tags say the assistant writes."""
        found: Spans = []
        return self._rendered(chat, where, found), found

    @property
    def has_generation_tags(self) -> bool:
        """Whether the template, where there is one, says what the assistant writes."""
        return self.tokenizer.chat_template is not None and has_generation_tags(self.template)

    def require_generation_tags(self) -> None:
        """Raise GranaryError unless the template says what the assistant writes."""
        if not self.has_generation_tags:
            raise GranaryError(
                "chat.mark_assistant=true: the model's chat template has no {% generation %} tags, which say what the"
                " assistant writes: put them into the template, or leave chat.mark_assistant out"
            )

    def identity(self) -> dict[str, Any]:
        """JSON for a store's plan: the template's hash, its variables, and the date where the template asks for it."""
        record: dict[str, Any] = {"template_hash": hashlib.sha256(self.template.encode()).hexdigest()}
        if self.variables:
            record["variables"] = dict(self.variables)
        if CLOCK.search(self.template):
            record["date"] = self.today.isoformat()
        return record


@cache  # for each chat again otherwise
def clock(today: date) -> dict[str, str]:
    """What each code of strftime stands for at midnight of `today`, without a leading zero ("%-d") too."""
    midnight = datetime.combine(today, datetime.min.time())
    codes = [f"%{zeros}{letter}" for zeros in ("", "-") for letter in ascii_letters]
    return {code: told for code in codes if (told := midnight.strftime(code)) != code}
