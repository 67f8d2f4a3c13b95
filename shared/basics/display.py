"""Text from files, folders and URLs on its way to a terminal or a log: nothing in it acts, no secret is given away.

A name may hold the signs that move a cursor or colour a terminal, and a URL may hold a password. Whatever is shown
passes through `shown`; URLs with a password are refused where they are given (`refuse_password`), since what is given
is also saved.
"""

import re
from typing import Any

from shared.basics.errors import GranaryError

# C0 and C1 control signs but newline and tab, and those that turn the direction of writing or hide.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
PASSWORD = re.compile(r"(://[^\s/@:'\"]*:)[^\s/'\"]+@")
TOKEN = re.compile(r"(\bhttps?://)[^\s/@:'\"]+@")  # a name alone there is one who may read; elsewhere, a container
SECRET = re.compile(
    r"([?&][\w-]*(?:signature|sig|token|password|passwd|secret|key|keyid|accessid|credential)=)[^&\s'\"]+", re.I
)
MASK = "***"


def shown(text: str) -> str:
    """`text` with acting signs written out (``\\x1b``) and passwords masked; newlines and tabs stay."""
    return ACTING.sub(lambda found: ascii(found[0])[1:-1], masked(text))


def one_line(error: object) -> str:
    """What an error says, on one line as it is shown."""
    return shown(" ".join(str(error).split()))


def masked(text: str) -> str:
    """`text` with the password of every URL in it replaced by ``***``, and the values of secrets in its query."""
    return SECRET.sub(rf"\1{MASK}", TOKEN.sub(rf"\1{MASK}@", PASSWORD.sub(rf"\1{MASK}@", text)))


def all_masked(value: Any) -> Any:
    """A configuration as it may be saved: every text in it masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: all_masked(item) for key, item in value.items()}
    return [all_masked(item) for item in value] if isinstance(value, list) else value


def without_grant(url: str) -> str:
    """A URL without a query that grants access: one that is signed anew names the same file."""
    return url.partition("?")[0] if SECRET.search(url) else url


def refuse_password(*texts: str) -> None:
    """Raise GranaryError where a text holds a URL with a password: it would be saved with the results."""
    for text in texts:
        if PASSWORD.search(text) or TOKEN.search(text):
            raise GranaryError(
                f"{masked(text)} holds a password, which would be saved with the results: leave it out of the URL and "
                'give it to fsspec by the environment, for example FSSPEC_FTP=\'{"username": ..., "password": ...}\''
            )
