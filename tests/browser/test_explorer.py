"""The explorer in a real Chromium: nothing in its console, nothing asked elsewhere, all by keyboard, on a phone too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.latents import Latents
from stage_inspect.explorer import publish
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.feeds import connect
from stage_inspect.explorer.server import Run
from tests.browser.chromium import Browser
from tests.exploring import serving
from tests.latents import HOSTILE, synthetic_latents, synthetic_weights

pytestmark = pytest.mark.browser
NAME = HOSTILE[0]
PAGES = ["overview", "latents", "latent/5", "latent/3", "compare/5/6", "concepts", "map", "lists"]
SCORES = {"f1": 0.5, "low": 0.4, "high": 0.6, "precision": 0.7, "recall": 0.39, "auroc": 0.98}
MORE_SCORES = {"auroc_low": 0.91, "auroc_high": 0.99, "chosen_f1": 0.61}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    made = synthetic_latents(tmp_path_factory.mktemp("browser") / "latents", 400, top=30, sample=30)
    made.notes.add_explanation(5, NAME, method="default", author='"><b>nobody</b>')
    failed = {"kind": NAME, "tokens": [260, 300], "values": [0, 1], "peak": 0, "place": 70}
    details = {"precision": 0.5, "controls": {NAME: {"value": 0.25, "low": 0.125, "high": 0.5}}, "failed": [failed, 0]}
    rule = made.notes.add_explanation(5, NAME, method="rule", author="granary")
    made.notes.add_score(rule, "rule_f1", 0.75, 0.5, 1.0, details)
    made.notes.add_score(rule, NAME, None, details={"why": NAME})
    made.notes.add_concept(
        NAME,
        f"regex {NAME}",
        {"split": NAME, "latents": [{"latent": 5, **SCORES, **MORE_SCORES}, {"latent": 9, **SCORES}]},
    )
    made.notes.set_labels(5, [NAME])
    made.notes.set_note(7, "seven: \u202e turned &amp; \0 nul")
    return made


@pytest.fixture(scope="module")
def documents(latents: Latents) -> Documents:
    """Latent 6 of the dictionary's second layer is fed by latent 5 of its first."""
    synthetic_weights(Path(latents.url).parent / "weights", ("0" * 64,) * 2, latents.num_latents)
    made = Documents(latents, "made up")
    connect([made], pytest.fail)
    return made


@dataclass(frozen=True)
class Place:
    """Where the pages are."""

    url: str
    writable: bool


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@contextmanager
def hosting(folder: Path) -> Iterator[str]:
    """An ordinary web server that knows nothing of this project."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module", params=["server", "folder", "file"])
def place(
    request: pytest.FixtureRequest, documents: Documents, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The same pages, three ways."""
    if request.param == "server":
        with serving([Run(documents, None, "there is no model"), Run(documents, None)]) as client:
            yield Place(f"{client.origin}/", True)
    elif request.param == "folder":
        folder = tmp_path_factory.mktemp("folder") / "site"
        publish.write_folder(documents, folder)
        with hosting(folder) as url:
            yield Place(url, False)
    else:
        file = tmp_path_factory.mktemp("file") / "latents.html"
        publish.write_page(documents, range(100), file)
        yield Place(file.as_uri(), False)


@pytest.fixture(autouse=True)
def _clean(browser: Browser, place: Place) -> Iterator[None]:
    """Every test ends with an empty console and without a request to anyone else."""
    browser.resize(1280, 900)
    yield
    assert browser.console() == []
    root = place.url if place.url.startswith("http") else place.url.rpartition("/")[0]
    assert [url for url in browser.requested() if not url.startswith((root, "data:", "blob:"))] == []


def pages(place: Place) -> list[str]:
    return [page for page in PAGES if place.writable or page != "lists"]


def test_every_page_is_drawn_on_a_phone_and_wide(browser: Browser, place: Place) -> None:
    for page in pages(place):
        browser.resize(390, 844)
        browser.go(f"{place.url}#/{page}")
        for width, height in ((390, 844), (1280, 900)):  # the phone is turned into a desk under the page
            browser.resize(width, height)
            browser.settle()
            assert browser.text("h1"), page
            overflow = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, (page, width)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_colour(browser: Browser, place: Place, dark: bool) -> None:
    """Contrast of every coloured token, and of the muted text, by the formula of WCAG 2: at least 4.5."""
    browser.prefer(dark=dark)
    browser.go(f"{place.url}#/latent/5")
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 50
    assert min(ratios) >= 4.5
    browser.prefer(dark=False)


def test_hostile_text_is_text(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latent/5")
    assert browser.text(".name").startswith(NAME)
    assert browser.text(".label-chip") == NAME
    for page in ("latents?q=img", "latent/7", "compare/5/7", "concepts"):
        browser.go(f"{place.url}#/{page}")
    assert browser.run(
        "return [document.images.length, document.querySelectorAll('main script, main b b').length]"
    ) == [0, 0]
    assert browser.run("return window.alerted === undefined && document.title.length > 0")


def test_scores_of_a_concept_stand_with_their_intervals(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/concepts")
    rows = "return [...document.querySelectorAll('.concepts tbody tr')].map((row) => [...row.cells].slice(1)"
    rows += ".map((cell) => cell.innerText.replace(/\\s+/g, ' ').trim()))"
    assert browser.run(rows) == [
        ["0.500 0.40\u20130.60", "0.610", "0.700", "0.390", "0.980 0.91\u20130.99"],
        ["0.500 0.40\u20130.60", "\u2013", "0.700", "0.390", "0.980"],
    ]


def test_what_feeds_a_latent_leads_to_it(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latent/6")
    assert [text.split()[:3] for text in browser.run(FEEDS)] == [["0", "/", "5"]]
    assert browser.run("return document.querySelector('.feeds h3').innerText") == "Fed by"
    browser.run("document.querySelector('.feeds a').click()")
    browser.settle()
    assert browser.text("h1") == "5"
    assert browser.run("return document.querySelector('.feeds h3').innerText") == "Feeds"
    browser.run("document.querySelector('.feeds a').click()")
    browser.settle()
    assert browser.text("h1") == "6"
    browser.go(f"{place.url}#/latent/8")
    assert browser.run("return document.querySelector('.feeds')") is None


@pytest.mark.parametrize("width", [1280, 390])
def test_what_long_lists_hold_stays_in_their_panels(browser: Browser, place: Place, width: int) -> None:
    """Names and tokens of any length, in the lists that lie side by side and across layers."""
    browser.resize(width, 900)
    browser.go(f"{place.url}#/latent/6")
    names = "document.querySelectorAll('.pair .name')"
    assert browser.run(f"return {names}.length") > 1
    browser.run(f"{names}.forEach((name) => {{ name.textContent = 'x'.repeat(400); }})")
    try:
        assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    finally:
        browser.resize(1280, 900)


def test_a_split_character_is_whole(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latent/5")
    assert "😀" in browser.text(".examples")


def test_latents_by_keyboard(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latent/5")
    browser.press("j")
    assert browser.text("h1") == "6"
    browser.press("k")
    browser.press("k")
    assert browser.text("h1") == "4"
    browser.press("r")
    assert browser.text("h1").isdigit()
    browser.press("/", "1", "2", "ENTER")
    assert browser.text("h1") == "12"
    browser.press("t")
    assert browser.text("h1") == "Latents"
    browser.press("?")
    assert browser.run("return document.querySelector('dialog').open")
    browser.press("ESCAPE")
    browser.press("o")
    assert browser.text("h1") == "made up"


def test_tokens_by_keyboard(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latent/5")
    browser.run("document.querySelector('.tokens').focus()")
    for _ in range(4):
        browser.press("RIGHT")
    told = browser.text(".tip")
    place_of = browser.run(
        "return [...document.querySelector('.tokens').children].findIndex(t => t.classList.contains('here'))"
    )
    assert place_of == 3
    assert "token" in told
    browser.press("ESCAPE")
    assert browser.run("return getComputedStyle(document.querySelector('.tip')).visibility") == "hidden"


def test_the_table_sorts_and_filters_and_its_address_says_so(browser: Browser, place: Place, latents: Latents) -> None:
    held = range(100) if place.url.startswith("file") else range(400)
    largest = sorted(held, key=lambda latent: (-latents.table["max"][latent].astype("f4"), latent))
    browser.go(f"{place.url}#/latents?sort=-max")
    assert shown_latents(browser)[:5] == largest[:5]
    density = latents.table["density"]
    few = [latent for latent in largest if density[latent] > 0.01]
    browser.go(f"{place.url}#/latents?sort=-max&density=0.01..")
    assert shown_latents(browser)[:5] == few[:5]
    assert browser.text(".title .caption").startswith(f"{len(few)} of ")
    browser.run("document.querySelector('[aria-sort] button').click()")
    browser.settle()
    assert "sort=max" in browser.address
    assert shown_latents(browser)[:3] == few[::-1][:3]
    browser.run("document.querySelector('.sheet a').focus()")
    browser.press("DOWN")
    browser.press("END")
    browser.press("ENTER")
    assert browser.text("h1") == str(few[0])


def test_the_last_row_of_the_table_is_there(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/latents?sort=latent")
    browser.run("const g = document.querySelector('.grid'); g.scrollTop = g.scrollHeight")
    browser.settle()
    assert shown_latents(browser)[-1] == (99 if place.url.startswith("file") else 399)


def test_what_is_not_there_is_told(browser: Browser, place: Place) -> None:
    for page in ("latent/5000", "latent/x", "nowhere", "compare/5/5000", "latent/%3Cscript%3E"):
        browser.go(f"{place.url}#/{page}")
        assert browser.text("h1") == "Not found"


def test_points_by_keyboard(browser: Browser, place: Place) -> None:
    browser.go(f"{place.url}#/map")
    browser.run("document.querySelector('canvas').focus()")
    browser.press("RIGHT")
    browser.press("RIGHT")
    told = browser.text(".tip")
    browser.press("ENTER")
    assert told.startswith(f"latent {browser.text('h1')}:")


def test_notes_and_lists_are_written(browser: Browser, place: Place, latents: Latents) -> None:
    if not place.writable:
        browser.go(f"{place.url}#/latent/9")
        assert browser.run("return document.querySelectorAll('textarea, .star').length") == 0
        return
    browser.go(f"{place.url}#/latent/9")
    browser.run("document.querySelector('[aria-label=Note]').focus()")
    browser.press(*"ends of lines")
    browser.run("document.querySelector('form:has([aria-label=Note]) button').click()")
    browser.run("document.querySelector('.star').click()")
    browser.wait(lambda: latents.notes.note(9) == "ends of lines" and latents.notes.lists() == {"starred": [9]})
    browser.go(f"{place.url}#/lists")
    assert "ends of lines" in browser.text(".kept")
    browser.run("document.querySelector('.kept button').click()")
    browser.wait(lambda: latents.notes.lists() == {})


def test_two_dictionaries_side_by_side(browser: Browser, place: Place) -> None:
    if not place.writable:
        pytest.skip("files hold one dictionary")
    browser.go(f"{place.url}#/compare/5/1:6")
    assert browser.run("return document.querySelectorAll('h2 a')[1].getAttribute('href')") == "with/1/#/latent/6"


def shown_latents(browser: Browser) -> list[int]:
    rows: list[int] = browser.run("return [...document.querySelectorAll('.sheet > a')].map(row => row.index)")
    return rows


FEEDS = "return [...document.querySelectorAll('.feeds li a')].map((link) => link.innerText)"
# Colours as the browser computes them, each laid over what is below it.
CONTRAST = """
const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const pen = canvas.getContext('2d', {willReadFrequently: true});
function over(colours) {
  pen.clearRect(0, 0, 1, 1);
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b;
}
function ratio(element) {
  const below = [];
  for (let one = element; one; one = one.parentElement) below.unshift(getComputedStyle(one).backgroundColor);
  const back = over(below), front = over([...below, getComputedStyle(element).color]);
  const [light, dark] = [luminance(back), luminance(front)].sort((a, b) => b - a);
  return (light + .05) / (dark + .05);
}
const texts = '.t, .caption, .from, .dim, dt, dd, small, h1, h2, h3, nav a, .name, .num, .choice button';
return [...document.querySelectorAll(texts)].map(ratio);
"""


def test_scores_stand_with_their_controls_and_failures(browser: Browser, place: Place, latents: Latents) -> None:
    browser.go(f"{place.url}#/latents?sort=-rule_f1&rule_f1=0.5..")
    assert browser.text(".title .caption").startswith("1 of ")
    browser.go(f"{place.url}#/latent/5")
    shown = browser.run("return document.querySelector('.explained .score').innerText")
    assert all(text in shown for text in ("rule f1", "0.75", "0.5 to 1", f"control: {NAME}", "0.25", "precision"))
    assert "failed" in browser.run("return document.querySelectorAll('.explained .score')[1].innerText")
    browser.run("document.querySelector('.explained .score details').open = true")
    assert browser.run("return document.querySelectorAll('.explained .score .examples li').length") == 2
    if not place.writable:
        assert not browser.run("return document.querySelectorAll('.explained form').length")
        return
    browser.go(f"{place.url}#/latent/11")
    browser.run("document.querySelector('.explained details').open = true")
    browser.run("document.querySelector('.explained textarea').value = 'my own words'")
    browser.run("document.querySelector('.explained form button').click()")
    browser.wait(lambda: [one.text for one in latents.notes.explanations(11)] == ["my own words"])
    browser.wait(lambda: "my own words" in browser.text("p.name"))
