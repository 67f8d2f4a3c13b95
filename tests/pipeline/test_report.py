"""The HTML reports: nothing fetched, everything escaped, and drawn as meant by a real headless Chromium."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest

from stage_eval.results.comparison import LeftOut, compare
from stage_eval.results.evaluation import Evaluation
from stage_eval.show.compare import render_comparison
from stage_eval.show.plots import evaluation_plots
from stage_eval.show.report import render
from stage_eval.show.sweep_plots import apart, lines, pareto_front, sweep_plots
from stage_eval.show.theme import LIGHT, build, style, to_png, to_svg
from tests.evaluations import at_site, document, example

HOSTILE = '<script>alert("x")</script> & <b>"bold"</b>'


@cache
def one_page() -> str:
    return render(example())


@cache
def sweep_page() -> str:
    reports = [example(k, expansion, f"k={k},expansion={expansion}") for k in (8, 16, 32) for expansion in (8, 16)]
    return render_comparison(compare(reports, [f"{report.sae.name}/report.html" for report in reports]))


class References(HTMLParser):
    """What a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                (self.links if tag == "a" else self.loads).append(value or "")
            if name == "style" and value and "url(" in value:
                self.loads += re.findall(r"url\(([^)]*)\)", value)


@pytest.mark.parametrize("make", [one_page, sweep_page])
def test_a_page_loads_nothing(make: Callable[[], str]) -> None:
    found, page = References(), make()
    found.feed(page)
    assert not [load for load in found.loads if not load.startswith(("#", "data:"))]
    assert not found.tags & {"script", "iframe", "object", "embed", "img"}
    assert "http://" not in page
    assert "https://" not in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_everything_from_data_is_escaped() -> None:
    report = document(name=HOSTILE)
    report["provenance"]["corpus"]["description"] = HOSTILE
    report["sae"]["config"]["activation"] = HOSTILE
    report["provenance"]["model"]["id"] = HOSTILE
    hostile = Evaluation.from_json(report)
    left_out = [LeftOut(path=HOSTILE, reason=HOSTILE)]
    for page in (render(hostile), render_comparison(compare([hostile], [f"x/{HOSTILE}"], left_out=left_out))):
        assert "<script" not in page
        assert "<b>" not in re.sub(r"<b>[\w ]+</b>", "", page)  # but the headings of the chain
        assert html.escape(HOSTILE) in page


def test_identifiers_are_unique_on_a_page() -> None:
    two_hooks = [example(), at_site("layers.1.resid_post")]
    for page in (one_page(), sweep_page(), render_comparison(compare(two_hooks, ["a", "b"]))):
        identifiers = re.findall(r'\bid="([^"]+)"', page)
        assert identifiers
        assert len(identifiers) == len(set(identifiers))


def test_a_sweep_page_has_what_the_sweep_is_about() -> None:
    page = sweep_page()
    headings = ("Quality against sparsity", "All SAEs", "Latents", "The activations of layers.2.resid_post")
    assert all(f"<h2>{heading}</h2>" in page for heading in (*headings, "Where it comes from", "Details"))
    titles = ("FVU against sparsity", "Loss recovered against sparsity", "Firing frequencies", "Decoder directions")
    assert all(f"<h3>{title}</h3>" in page for title in titles)
    assert "they differ in d_latent, k" in page
    assert page.count("ab" * 32) == 6  # the hash of every checkpoint
    assert "ffffffffffffffff" in page  # and of the store


def test_what_was_not_measured_is_left_out() -> None:
    missing = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl"))
    activations = {**document()["activations"], "store_norm_by_position": []}
    report = example(downstream=None, training=None, activations=activations, **missing)
    names = {plot.name for plot in evaluation_plots(report)}
    assert not names & {"cross_entropy", "loss_by_position", "training", "store_norm_by_position"}
    assert "What the model loses" not in render(report)
    assert "Least FVU" in render_comparison(compare([report, report], ["a", "b"]))


def test_figures_follow_the_colours_of_the_page() -> None:
    for plot in evaluation_plots(example()):
        svg = to_svg(plot)
        assert "var(--" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert to_png(plot, dpi=40).startswith(b"\x89PNG")


def test_pages_are_reproducible() -> None:
    assert render(example()) == one_page()


def test_a_pareto_front_by_hand() -> None:
    points = [(8, 0.2), (16, 0.1), (16, 0.15), (20, 0.12), (32, 0.1), (64, 0.05)]
    expected = [(8, 0.2), (16, 0.1), (64, 0.05)]
    assert pareto_front([*points, (4, math.nan)], larger_is_better=False) == expected
    recovered = [(l0, 1 - fvu) for l0, fvu in points]
    assert pareto_front(recovered, larger_is_better=True) == [(l0, 1 - fvu) for l0, fvu in expected]


def test_ticks_do_not_run_into_one_another() -> None:
    assert apart([8, 16, 32]) == [8, 16, 32]
    assert apart([30, 32, 50, 326, 356]) == [30, 50, 326]
    assert apart([0, 4], logarithmic=False) == [0, 4]


@pytest.mark.parametrize("ks", [range(1, 30), [2**i for i in range(16)], [10_000, 20_000, 40_000, 80_000]])
def test_drawn_tick_labels_do_not_overlap(ks: Sequence[int]) -> None:
    rows = compare([example(k=k) for k in ks], [None] * len(ks)).rows
    for plot in sweep_plots(rows):
        with matplotlib.rc_context(style(LIGHT)):
            figure = build(plot, LIGHT, titled=True)
            figure.canvas.draw()
            boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
        assert len(boxes) > 2
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), plot.name


def test_every_activation_has_its_line() -> None:
    reports = [document(name=name) for name in ("topk", "batchtopk", "matryoshka")]
    for report, activation in zip(reports, ("topk", "batchtopk", "batchtopk"), strict=True):
        report["sae"]["config"]["activation"] = activation
    reports[2]["sae"]["config"]["prefixes"] = [16, 1024]
    rows = compare(list(map(Evaluation.from_json, reports)), [None] * 3).rows
    assert sorted(lines(rows)) == ["batchtopk x8", "matryoshka x8", "topk x8"]


# In a frame of the width of a phone, the page reports how it was laid out and what was requested for it.
PROBE = """<!doctype html><title>probe</title>
<iframe id="frame" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="out"></pre>
<script>
document.getElementById("frame").onload = function () {{
  const page = this.contentWindow, body = page.document;
  const wide = [...body.querySelectorAll("svg, figure, .card, h1, p")].filter(
    (e) => e.getBoundingClientRect().right > page.innerWidth + 1).length;
  document.getElementById("out").textContent = JSON.stringify({{
    title: body.title, figures: body.querySelectorAll("figure svg").length,
    smallest: Math.min(...[...body.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().height)),
    letters: Math.min(...[...body.querySelectorAll("figure svg text")].map((e) => e.getBoundingClientRect().height)),
    overflow: body.documentElement.scrollWidth - page.innerWidth, wide: wide,
    requests: page.performance.getEntriesByType("resource").map((e) => e.name),
    background: page.getComputedStyle(body.body).backgroundColor,
  }});
}};
</script>"""


def chromium(profile: Path, *arguments: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: install one, or name it in the variable CHROMIUM")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([program, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["one", "sweep"])
def test_chromium_draws_it_on_a_phone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "page.html").write_text(one_page() if kind == "one" else sweep_page())
    (tmp_path / "probe.html").write_text(PROBE.format(width=390))
    done = chromium(tmp_path / "profile", "--dump-dom", (tmp_path / "probe.html").as_uri())
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert found["title"] == ("demo/sae" if kind == "one" else "Sweep comparison")
    assert found["figures"] == 12
    assert found["smallest"] > 100
    assert found["letters"] >= 8
    assert found["overflow"] <= 0
    assert found["wide"] == 0
    assert found["requests"] == []


FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>frame</title>
<style>body {{ margin: 0 }}</style>
<iframe src="page.html" style="width:{width}px;height:{height}px;border:0;display:block"></iframe>"""


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["one", "sweep"])
@pytest.mark.parametrize("width", [1200, 390])
def test_chromium_draws_it_light_and_dark(tmp_path: Path, kind: str, width: int) -> None:
    """Real screenshots, on a desk and on a phone; a window can't be narrower than 500 px, hence the frame."""
    height = 1600
    (tmp_path / "page.html").write_text(one_page() if kind == "one" else sweep_page())
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, height=height))
    pages = {}
    for name in ("light", "dark"):
        shot = tmp_path / f"{kind}-{width}-{name}.png"
        size = (f"--window-size={max(width, 600)},{height}", f"--screenshot={shot}")
        chromium(tmp_path / name, *size, (tmp_path / "frame.html").as_uri(), dark=name == "dark")
        pages[name] = matplotlib.image.imread(shot)[:, :width, :3]
    assert pages["light"].shape[:2] == (height, width)
    assert pages["light"].mean() > 0.8
    assert pages["dark"].mean() < 0.25
    for picture in pages.values():
        assert picture.std() > 0.03  # not an empty page
