"""What is printed and logged passes through ``shared.basics.display``: here for the log and for rich's tables."""

import logging
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from shared.basics.display import shown


class ShownFormatter(logging.Formatter):
    """A line of the log, nothing in which acts on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format as its base does, then escape as `shown` does."""
        return shown(super().format(record))


class LogFile(logging.FileHandler):
    """The log in the run's folder, opened at its first line. A disk that does not take it ends no run: stderr has all.

    Where the disk is full, what the run itself has to write will say so.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write as its base does, which does not catch that the file can't be opened."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Say it once, in a line, and write no more."""
        self.setLevel(logging.CRITICAL + 1)
        print(f"the log {shown(self.baseFilename)} can't be written: {sys.exception()}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Give up what could not be written."""
        with suppress(OSError):
            super().close()


class ShownConsole(Console):
    """A console for text of any origin: brackets are brackets, and acting signs are written out.

    Styles are given as ``style=`` or by rich's own objects.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string that is printed, in tables and titles too."""
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False, "highlight": False})
