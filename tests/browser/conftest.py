"""The browser of a module's tests."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Browser, open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened
