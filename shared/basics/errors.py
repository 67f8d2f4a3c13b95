"""The one exception a user is meant to see."""


class GranaryError(Exception):
    """A wrong input or a full disk: one line that says what is wrong and how to mend it.

    The entry points print it without a traceback and exit with status 2. Everything else that escapes a stage is a
    bug of ours and keeps its traceback.
    """


def told_of(error: BaseException) -> str:
    """What an exception of another library says, in one line of a readable length; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
