"""The page of an attribution graph in a real Chromium: opened as a file, nothing asked elsewhere, groups saved."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.sae.for_store import weights_sha256
from stage_trace.trace import trace
from tests.browser.chromium import Browser
from tests.latents import synthetic_latents
from tests.tracing import bundled_lorsa, bundled_transcoder

pytestmark = pytest.mark.browser
TEXT = "def f(x):\n    </script><b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of two layers, the first of which has a latents folder with hostile texts."""
    root = tmp_path_factory.mktemp("graph")
    for layer in range(2):
        bundled_transcoder(layer, threshold=0.8).save_pretrained(root / "tc" / f"layer_{layer}", {})
    where = root / "tc" / "layer_0" / "latents"
    synthetic_latents(where, 96)
    meta = json.loads((where / "meta.json").read_text())
    meta["dictionary"]["sha256"] = weights_sha256(root / "tc" / "layer_0")
    (where / "meta.json").write_text(json.dumps(meta))
    graph = trace("bundled", root / "tc", TEXT)
    graph.prune().save(root / "out", certificate=graph.certify(3, 8), spliced=graph.spliced())
    return root / "out"


def click(browser: Browser, selector: str, number: int = 0) -> None:
    browser.run(f"document.querySelectorAll({json.dumps(selector)})[{number}].click()")
    browser.settle()


def pin_two(browser: Browser) -> None:
    """The two most influential features."""
    for number in range(2):
        click(browser, "#detail .feeds button", number)
        click(browser, "#detail .actions button", 0)
        click(browser, "#detail .actions button", 1)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_a_feature_shows_where_it_fires(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    browser.resize(width, 900)
    browser.prefer(dark=dark)
    browser.go(f"file://{folder}/graph.html")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    layer_0 = browser.run("return nodes.findIndex((node) => data.cards[node.card] && node.layer === 0)")
    browser.run(f"select(nodes[{layer_0}])")
    browser.settle()
    assert browser.run("return document.querySelectorAll('#detail .example mark').length") > 0
    assert "granary explore" in browser.text("#detail")
    assert browser.run("return document.querySelectorAll('#detail .feeds small').length") > 0  # heads
    assert browser.run("return document.querySelectorAll('b, img, script').length") == browser.run(
        "return document.querySelectorAll('.chip b, script').length"
    )
    assert browser.console() == []
    assert [url for url in browser.requested() if not url.startswith(("file:", "data:"))] == []


def test_groups_are_saved_with_the_graph_and_kept(browser: Browser, folder: Path) -> None:
    browser.resize(1280, 900)
    browser.go(f"file://{folder}/graph.html")
    pin_two(browser)
    for number in range(2):
        click(browser, "#pinned .pick", number)
    browser.run("document.querySelector('#pinned input').value = 'both'")
    click(browser, "#pinned form button", 0)
    browser.run("HTMLAnchorElement.prototype.click = () => {}")  # nothing is downloaded
    browser.run("URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return ''; }")
    click(browser, "#pinned form button", 1)
    browser.wait(lambda: browser.run("return window.saved !== undefined"))
    saved: dict[str, Any] = json.loads(browser.run("return window.saved"))
    written = json.loads((folder / "graph.json").read_text())
    (group,) = saved["qParams"]["supernodes"]
    assert group[0] == "both"
    assert len(group) == 3
    assert saved["qParams"]["pinnedIds"] == group[1:]
    assert saved["links"] == written["links"]
    assert {**saved, "qParams": 0} == {**written, "qParams": 0}


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_latents_of_a_lorsa_have_a_mark_and_a_row_of_their_own(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    """Below the MLP of their layer; found, pinned and walked to as any other."""
    made = [bundled_transcoder(layer, threshold=0.8) for layer in range(4)]
    trace("bundled", [*made, bundled_lorsa(1)], TEXT).prune(0.95).save(tmp_path)
    browser.resize(width, 900)
    browser.prefer(dark=dark)
    browser.go(f"file://{tmp_path}/graph.html")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert not browser.run("return $('legend_attention').hidden")
    shown = browser.run("return nodes.filter((node) => node.kind === 'feature' && isAttention(node)).length")
    assert shown > 0
    assert browser.run("return document.querySelectorAll('.node.feature.attention path.mark').length") == shown
    rows = browser.run(
        "return nodes.filter((one) => one.layer === 1 && isInner(one)).map((one) => [isAttention(one), one.y])"
    )
    assert min(y for is_attention, y in rows if is_attention) > max(y for is_attention, y in rows if not is_attention)
    browser.run("select(nodes.find((node) => node.kind === 'feature' && isAttention(node)))")
    browser.settle()
    assert browser.text("#detail .badge").lower() == "attention feature"
    assert "graph.intervene" in browser.text("#detail")
    click(browser, "#detail .actions button", 0)
    assert browser.text("#pinned .chip").startswith("A1/")
    browser.run("$('search').value = 'attention latent'; search()")
    assert browser.run("return document.querySelectorAll('.node.found').length") == shown
    assert browser.console() == []


def test_keys_walk_the_graph_and_lists_are_shown_whole(browser: Browser, folder: Path) -> None:
    browser.resize(1280, 900)
    browser.go(f"file://{folder}/graph.html")
    assert browser.text("#spliced").split("\n")[-1].startswith("The replacement model has all dictionaries in")
    browser.run("select(nodes.find((node) => node.kind === 'logit'))")
    held = browser.run("return state.selected.inputs.length")
    assert held > 10
    assert browser.run("return document.querySelectorAll('#detail .feeds li').length") == 10
    browser.run("[...document.querySelectorAll('#detail .button')].at(-1).click()")
    assert browser.run("return document.querySelectorAll('#detail .feeds li').length") == held
    strongest = browser.run("return state.selected.inputs[0].source.id")
    browser.press("ARROW_DOWN")
    assert browser.run("return state.selected.id") == strongest
    assert browser.run("return document.activeElement === state.selected.group")
    browser.run("select(nodes.filter((node) => node.kind === 'token')[1])")
    browser.press("ARROW_RIGHT")
    assert browser.run("return [state.selected.kind, state.selected.position]") == ["token", 2]
    browser.press("/")
    browser.press("r", "e", "ARROW_LEFT")  # in the field, where it moves the caret
    assert browser.run("return [$('search').value, state.selected.position]") == ["re", 2]
    browser.press("ESCAPE")
    browser.press("ESCAPE")
    assert browser.run("return state.selected") is None
