"""A search for a concept from its page, in a real Chromium: begun by a click, ended by keyboard."""

from collections.abc import Iterator

import pytest

from shared.latents import Latents
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.searching import Place, Searching
from stage_inspect.explorer.server import Run
from tests.browser.chromium import Browser
from tests.exploring import serving
from tests.planted import planted_study

pytestmark = pytest.mark.browser
ENDLESS = r"((?:.|\n)+)+\x00"  # tries every way to divide a document
TOLD = ".search [role=status]"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    latents = Latents.open(planted_study(tmp_path_factory.mktemp("search")) / "latents")
    searching = Searching(Place(latents.url))
    with serving([Run(Documents(latents, "planted"), None, searching=searching)]) as client:
        yield f"{client.origin}/"


def test_a_search_by_click_and_one_by_keyboard(browser: Browser, url: str) -> None:
    for width, height in ((390, 844), (1280, 900)):
        browser.resize(width, height)
        browser.go(f"{url}#/overview")
        browser.press("p")
        assert browser.text("h1") == "Concepts"  # though nothing was found yet
        assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert browser.run(UNNAMED) == []
    browser.run("document.querySelector('.search textarea').focus()")
    browser.press(*"self")
    browser.run("document.querySelector('.search .primary').click()")
    browser.wait(lambda: browser.text(TOLD) == "Found: /self/.")
    browser.wait(lambda: browser.text(".concepts section h2").startswith("/self/"))
    assert browser.run("return document.querySelector('.concepts tbody th a').getAttribute('href')") == "#/latent/4"

    browser.run("document.querySelector('.search textarea').value = ''")
    browser.run("document.querySelector('.search textarea').focus()")
    browser.press(*ENDLESS, "TAB", "TAB", "TAB", "ENTER")
    browser.wait(lambda: "tokens" in browser.text(".search .running .num"))
    assert browser.run("return document.activeElement.innerText") == "Cancel"
    browser.press("ENTER")
    browser.wait(lambda: browser.text(TOLD) == "The search was cancelled.")
    assert browser.run("return document.activeElement.innerText") == "Search"
    assert not browser.run("return document.querySelector('.search progress').offsetParent")

    browser.run(CHOOSE_PYTHON)
    browser.run("document.querySelector('.search .primary').click()")
    browser.wait(lambda: browser.text(TOLD) == "Found: self.")
    browser.wait(lambda: browser.text(".concepts section h2").startswith("self"))  # before all that was found earlier

    browser.run(CHOOSE_REGEX)
    browser.run("document.querySelector('.search textarea').value = ''")
    browser.run("document.querySelector('.search textarea').focus()")
    browser.press("(")
    browser.run("document.querySelector('.search .primary').click()")
    browser.wait(lambda: "'(' is no regular expression" in browser.text(TOLD))
    assert browser.console() == []
    assert [one for one in browser.requested() if not one.startswith(url)] == []


CHOOSE_PYTHON, CHOOSE_REGEX = (
    f"const kind = document.querySelector('.search select'); kind.value = '{kind}';"
    f"kind.dispatchEvent(new Event('change')); {then}"
    for kind, then in (
        (
            "python",
            "const what = document.querySelector('.asked select'); what.value = 'self';"
            "what.dispatchEvent(new Event('input'))",
        ),
        ("regex", ""),
    )
)
# Controls of the form that a screen reader could not name.
UNNAMED = """
return [...document.querySelectorAll('.search :is(input, select, textarea, progress)')]
  .filter((one) => !one.labels?.length && !one.ariaLabel).map((one) => one.outerHTML);
"""
