"""JSON from elsewhere: what no file, terminal or file name can hold is refused where it is read."""

import pytest

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '["\\uDC00x"]', '{"\\ud83d": 1}'])
def test_half_of_a_surrogate_pair_is_refused(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(GranaryError, match=r"^here is not JSON: "):
            parse_json(data, "here")


def test_a_whole_pair_is_one_character() -> None:
    assert parse_json(b'["\\ud83d\\ude00", "\\u00e9", "\\\\ud800"]', "here") == ["\U0001f600", "é", "\\ud800"]
