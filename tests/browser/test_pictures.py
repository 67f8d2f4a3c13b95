"""Pictures in a real Chromium: heat maps in their scales, captions as text, a box by pointer and by keyboard."""

from collections.abc import Iterator

import numpy as np
import pytest

from shared.latents import Latents, Vocabulary
from stage_inspect.explorer import publish
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.server import Run
from stage_inspect.regions.looking import Looking
from tests.browser.chromium import Browser
from tests.exploring import serving
from tests.latents import HOSTILE
from tests.pictured_run import pictured_run

pytestmark = pytest.mark.browser
pytest.importorskip("PIL")
NAME = HOSTILE[0]
PAGE = "latent/5"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Every caption is a script tag and an image that runs one."""
    folder = pictured_run(tmp_path_factory.mktemp("browser"), Vocabulary.of([NAME.encode()] * 70_000))
    return Latents.open(folder / "latents")


@pytest.fixture(scope="module", params=["server", "file"])
def url(request: pytest.FixtureRequest, latents: Latents, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    documents = Documents(latents, "made up")
    if request.param == "server":
        with serving([Run(documents, None, looking=Looking.open(latents.url))]) as client:
            yield f"{client.origin}/"
    else:
        file = tmp_path_factory.mktemp("file") / "latents.html"
        publish.write_page(documents, range(24), file)
        yield file.as_uri()


@pytest.fixture(autouse=True)
def _clean(browser: Browser, url: str) -> Iterator[None]:
    """Every test ends with an empty console and without a request to anyone else."""
    browser.resize(1280, 900)
    yield
    assert browser.console() == []
    root = url if url.startswith("http") else url.rpartition("/")[0]
    assert [one for one in browser.requested() if not one.startswith((root, "data:", "blob:"))] == []


def open_page(browser: Browser, url: str, page: str = PAGE) -> None:
    browser.go(f"{url}#/{page}")
    browser.wait(
        lambda: bool(browser.run("return [...document.images].every((one) => one.complete && one.naturalWidth)"))
    )


def test_captions_are_text_and_images_are_data(browser: Browser, url: str, latents: Latents) -> None:
    for width in (1280, 390):
        browser.resize(width, 900)
        open_page(browser, url)
        captions = browser.run("return [...document.querySelectorAll('.pictures .around')].map((one) => one.innerText)")
        assert any(NAME in caption for caption in captions)
        shown = {one.sha256 for one in latents.pictures(5)}
        sources = browser.run("return [...document.images].map((one) => one.src)")
        assert len(sources) == len(shown)
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        assert browser.run("return document.querySelectorAll('main script, .around img').length") == 0
        assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_heat_maps_have_the_scale_and_look_that_is_chosen(browser: Browser, url: str, latents: Latents) -> None:
    open_page(browser, url)
    groups: dict[str, list[float]] = {}
    for one in latents.pictures(5):
        groups.setdefault(one.sha256, []).append(one.value)
    values = [max(group) for group in groups.values()]
    shared = hottest(browser)
    assert shared == pytest.approx([255 * 0.72 * (value / max(values)) ** 0.5 for value in values], abs=1.5)
    choose(browser, "own scale")
    assert hottest(browser) == pytest.approx([255 * 0.72] * len(values), abs=1.5)
    levels = browser.run(LEVELS)
    choose(browser, "smooth")
    assert all(smooth > 4 * cells for smooth, cells in zip(browser.run(LEVELS), levels, strict=True) if cells > 1)
    choose(browser, "off")
    assert hottest(browser) == [0] * len(values)
    choose(browser, "cells")
    choose(browser, "one scale")
    assert hottest(browser) == pytest.approx(shared)


def test_a_cell_is_drawn_where_it_lies(browser: Browser, url: str, latents: Latents) -> None:
    """Cells are 10 pixels of an image of 30 x 20, which is drawn 256 wide."""
    open_page(browser, url)
    one = latents.pictures(5)[0]
    fires = np.zeros((2, 3), bool)
    for row, col in one.cell.tolist():
        fires[row, col] = True
    drawn = browser.run(
        "const c = document.querySelector('.picture canvas'), z = c.width / 30, p = c.getContext('2d');"
        "return [5, 15].map((y) => [5, 15, 25].map((x) => p.getImageData(x * z, y * z, 1, 1).data[3] > 0))"
    )
    assert drawn == fires.tolist()


def test_a_box_by_keyboard_and_by_pointer(browser: Browser, url: str, latents: Latents) -> None:
    if url.startswith("file"):
        assert browser.run("return document.querySelector('nav a[data-path=image]')") is None
        return
    looking = Looking.open(latents.url)
    open_page(browser, url, "image/4")
    assert listed(browser) == wanted(looking, (8, 5, 23, 15))  # the quarter in the middle, to whole pixels
    fields = "document.querySelectorAll('.sides input')"
    for number, side in enumerate((0, 0, 10, 10)):
        browser.run(f"{fields}[{number}].focus(); {fields}[{number}].select()")
        browser.press(*str(side))
    browser.wait(lambda: listed(browser) == wanted(looking, (0, 0, 10, 10)))
    from selenium.webdriver.common.action_chains import ActionChains

    frame = browser.driver.find_element("css selector", ".drawing")
    across, down = frame.size["width"] / 30, frame.size["height"] / 20
    move = ActionChains(browser.driver)
    move.move_to_element_with_offset(frame, round(-5 * across), round(-10 * down) + 1).click_and_hold()
    move.move_by_offset(round(10 * across), round(10 * down)).release().perform()
    browser.wait(lambda: browser.run(f"return [...{fields}].map((one) => one.value)") == ["10", "0", "20", "10"])
    browser.wait(lambda: listed(browser) == wanted(looking, (10, 0, 20, 10)))
    browser.run(f"{fields}[0].focus(); {fields}[0].select()")
    browser.press("9", "9")
    browser.wait(lambda: "is empty" in browser.text(".panel [role=status]"))
    browser.console()  # which tells of the answer that refused it


def listed(browser: Browser) -> list[int]:
    return [
        int(one)
        for one in browser.run("return [...document.querySelectorAll('.boxed li')].map((li) => li.dataset.latent)")
    ]


def wanted(looking: Looking, box: tuple[int, ...]) -> list[int]:
    return [one.latent for one in looking.box(4, 0, box).latents]


def choose(browser: Browser, name: str) -> None:
    browser.run(f"[...document.querySelectorAll('.choice button')].find((one) => one.innerText === '{name}').click()")
    browser.settle()


def hottest(browser: Browser) -> list[float]:
    """The largest alpha of each heat map."""
    found: list[float] = browser.run(
        "return [...document.querySelectorAll('.picture canvas')].map((c) => {"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let most = 0;"
        " for (let at = 3; at < d.length; at += 4) most = Math.max(most, d[at]); return most; })"
    )
    return found


# How many different strengths each heat map has.
LEVELS = """
return [...document.querySelectorAll('.picture canvas')].map((c) => {
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
  for (let at = 3; at < d.length; at += 4) seen.add(d[at]);
  return seen.size;
});
"""
