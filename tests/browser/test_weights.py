"""The page of global weights in a real Chromium: opened as a file, nothing asked elsewhere, texts as text."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.latents.global_weights import COLUMNS, DIRECTIONS, GlobalWeights, GlobalWeightsWriter, WeightsMeta
from shared.lm.hookpoint import HookPoint
from shared.store.io.open import open_io
from stage_trace.known import Known
from stage_trace.weights.page import weights_page
from tests.browser.chromium import Browser
from tests.latents import synthetic_latents

pytestmark = pytest.mark.browser
EACH = 12


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of twelve latents; latent f of layer 1 is fed by latent f of layer 0, half of them negatively."""
    root = tmp_path_factory.mktemp("weights")
    writer = GlobalWeightsWriter(open_io(root), 2)
    ends = {"sources": np.r_[np.full(EACH, -1), np.arange(EACH)], "targets": np.r_[np.arange(EACH) + EACH, [-1] * EACH]}
    for direction in DIRECTIONS:
        latent = np.stack([ends[direction], np.full(2 * EACH, -1)], 1)
        for name, dtype in COLUMNS.items():
            value = np.where(latent < 0, 0, 3.5 if dtype != "float32" else np.where(latent % 2, -1.5, 1.5))
            writer.append(f"{direction}/{name}", (latent if name == "latent" else value).astype(dtype))
    writer.append("fired", np.full(2 * EACH, 7, np.uint32))
    layers = [
        {"layer": layer, "num_latents": EACH, "dictionary": "", "sha256": None, "first": 0, "norm_factor": 1.0}
        for layer in range(2)
    ]
    writer.finish(WeightsMeta(layers=layers, most=2, tokens=100, store={}, model={}, versions={}))
    latents = synthetic_latents(root / "latents", EACH)
    latents.notes.set_note(2, "opens <b>bold</b>")
    known = Known({HookPoint(0, "mlp_out"): (latents, range(EACH))})
    (root / "weights.html").write_text(weights_page(GlobalWeights.open(root), known), encoding="utf-8")
    return root / "weights.html"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_a_latent_shows_what_feeds_it_and_what_it_feeds(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.resize(width, 900)
    browser.prefer(dark=dark)
    browser.go(f"file://{page}#1/2")
    browser.settle()
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert "opens <b>bold</b>" in browser.text("#detail .feeds")
    browser.run("document.querySelector('#detail .feeds button').click()")
    browser.settle()
    assert browser.text("#detail h3") == "opens <b>bold</b>"
    assert "layer 1, latent 2" in browser.text("#detail .feeds")
    browser.run("const s = document.getElementById('search'); s.value = '1/11'; s.dispatchEvent(new Event('input'))")
    assert browser.run("return document.querySelectorAll('#latents tr').length") == 1
    assert browser.run("return document.querySelectorAll('b, img').length") == 0
    assert browser.console() == []
    assert [url for url in browser.requested() if not url.startswith(("file:", "data:"))] == []
    assert json.loads(browser.run("return document.getElementById('data').textContent"))["latents"]
