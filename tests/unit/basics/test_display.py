"""What is shown does not act and gives no secret away."""

import pytest

from shared.basics.display import all_masked, masked, refuse_password, shown, without_grant
from shared.basics.errors import GranaryError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain [/x] ünï 日本\n\tnext", "plain [/x] ünï 日本\n\tnext"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b2J\rover", "\\x9b2J\\rover"),
        ("abc\u202edcb\u200b", "abc\\u202edcb\\u200b"),
        ("not utf-8: \udcff", "not utf-8: \\udcff"),
    ],
)
def test_signs_that_act_are_written_out(text: str, expected: str) -> None:
    assert shown(text) == expected
    shown(text).encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://user:secret@host/x", "s3://user:***@host/x"),
        ("see ftp://u:se@cr@et@h:21/a/b and http://:pw@h", "see ftp://u:***@h:21/a/b and http://:***@h"),
        ("simplecache::sftp://me:pw@h/x", "simplecache::sftp://me:***@h/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&sig=q%2B", "https://h/x?a=1&X-Amz-Signature=***&sig=***"),
        ("https://h/x?AWSAccessKeyId=AK&Expires=9", "https://h/x?AWSAccessKeyId=***&Expires=9"),
        (
            "https://h/x?X-Amz-Security-Token=t&X-Amz-Credential=AK%2F",
            "https://h/x?X-Amz-Security-Token=***&X-Amz-Credential=***",
        ),
        ("https://ghp_token@host/x", "https://***@host/x"),
    ],
)
def test_secrets_in_urls_are_masked(text: str, expected: str) -> None:
    assert masked(text) == shown(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/a@b:c/d",
        "http://localhost:9000/x@y",
        "name=a:b@c",
        "hf://owner/name",
    ],
)
def test_what_is_no_password_stays_and_is_taken(text: str) -> None:
    assert masked(text) == text
    refuse_password(text)


def test_a_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(GranaryError, match=r"store\.url=ftp://u:\*\*\*@h/x holds a password.*FSSPEC_FTP") as caught:
        refuse_password("a=b", "store.url=ftp://u:hunter2@h/x")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(GranaryError, match=r"https://\*\*\*@h/x holds a password"):
        refuse_password("corpus.files=https://hunter2@h/x")


def test_a_configuration_is_saved_without_secrets() -> None:
    config = {"store": {"url": "https://h/x?sig=a"}, "others": [{"url": "https://h/y?token=b"}], "k": 8, "name": None}
    saved = {
        "store": {"url": "https://h/x?sig=***"},
        "others": [{"url": "https://h/y?token=***"}],
        "k": 8,
        "name": None,
    }
    assert all_masked(config) == saved
    assert without_grant("https://h/x.parquet?X-Amz-Signature=a") == "https://h/x.parquet"
    assert without_grant("https://h/x?page=2") == "https://h/x?page=2"
