"""One browser for all tests."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Browser, open_browser


@pytest.fixture(scope="session")
def opened() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def browser(opened: Browser) -> Browser:
    """As new for each module: an empty page in light colours, nothing told so far."""
    opened.driver.get("about:blank")
    opened.prefer(dark=False)
    opened.console(), opened.requested()
    return opened
