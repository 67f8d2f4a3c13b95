"""The pages that run the model, in a real Chromium: a text of one's own, and steering."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.lm import load_tokenizer
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.live import Live, LiveSettings
from stage_inspect.explorer.server import Run
from tests.browser.chromium import Browser
from tests.exploring import opened_study, serving, small_study

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = small_study(tmp_path_factory.mktemp("live"))
    latents = opened_study(folder)
    live = Live(latents, LiveSettings.find(latents, None, None))
    with serving([Run(Documents(latents, "made up"), live)]) as client:
        yield f"{client.origin}/"


@pytest.fixture(autouse=True)
def _clean(browser: Browser, url: str) -> Iterator[None]:
    browser.resize(390, 844)
    yield
    assert browser.console() == []
    assert [one for one in browser.requested() if not one.startswith(url)] == []


def test_latents_of_a_text_of_ones_own(browser: Browser, url: str) -> None:
    browser.go(f"{url}#/text")
    browser.wait(lambda: "latents fire" in browser.text("main .caption"))
    browser.run("const box = document.querySelector('textarea'); box.value = ''; box.focus()")
    browser.press(*HOSTILE)
    tokens = 1 + len(load_tokenizer("bundled")(HOSTILE, add_special_tokens=False).input_ids)  # and BOS
    browser.wait(lambda: browser.text("main .caption").startswith(f"{tokens} tokens"))
    assert browser.run("return document.images.length") == 0
    fired = browser.run("return document.querySelectorAll('.found li').length")
    assert 6 <= fired <= 40
    browser.run("document.querySelectorAll('.found button')[2].click()")
    chosen = browser.text(".found .chosen b")
    assert browser.text(".reading-text .kicker").lower() == f"coloured by latent {chosen}"
    browser.run("document.querySelector('.tokens .t:last-child').click()")
    assert browser.run("return document.querySelectorAll('.found li').length") == 6  # k of them on one token
    assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_steering_from_the_page(browser: Browser, url: str) -> None:
    browser.go(f"{url}#/latent/5")
    browser.run("[...document.querySelectorAll('.actions a')].find((link) => link.innerText === 'Steer').click()")
    browser.settle()
    assert browser.text("h1") == "Steer"
    browser.run("document.querySelectorAll('input[type=number]')[1].value = '900'")
    browser.run("document.querySelectorAll('input[type=number]')[2].value = '5'")
    browser.run("document.querySelector('form.panel button.primary').click()")
    browser.wait(lambda: browser.run("return document.querySelectorAll('.output').length") == 2)
    clean, steered = browser.run("return [...document.querySelectorAll('.output')].map((one) => one.innerText)")
    assert clean != steered
    assert browser.run("return document.querySelectorAll('.results tbody tr').length") == 8
    assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    browser.run("document.querySelectorAll('input[type=number]')[0].value = '64'")
    browser.run("document.querySelector('form.panel').noValidate = true")
    browser.run("document.querySelector('input[type=number]').dispatchEvent(new Event('input'))")
    browser.run("document.querySelector('form.panel button.primary').click()")
    browser.wait(lambda: "latent must be" in browser.text("form .error"))
    browser.console()  # Chromium itself tells of the answer 400
