"""The HTML reports: nothing fetched, everything escaped, and drawn as meant by a real headless Chromium."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from stage_eval.measure.breakdown import frequency_groups, position_groups
from stage_eval.show.compare import compare, render_comparison
from stage_eval.show.plots import evaluation_plots
from stage_eval.show.report import render
from stage_eval.show.sweep_plots import apart, lines, pareto_front
from stage_eval.show.theme import to_png, to_svg

HOSTILE = '<script>alert("x")</script> & <b>"bold"</b>'
DOWNSTREAM = {
    "ce_clean": 1.9,
    "ce_spliced": 2.02,
    "ce_zero": 8.9,
    "ce_mean": 7.4,
    "ce_increase": 0.12,
    "loss_recovered": 0.983,
    "loss_recovered_over_mean": 0.978,
    "kl": 0.11,
    "kl_zero": 7.1,
    "kl_mean": 6.0,
    "kl_recovered": 0.985,
    "top1_agreement": 0.87,
}
RECONSTRUCTION = {
    "fvu": 0.11,
    "fvu_uncentred": 0.08,
    "mse_per_token": 3.1,
    "cosine": 0.94,
    "relative_norm": 0.95,
    "reconstruction_bias": 0.97,
    "l0": 15.6,
    "l1": 40.0,
}
NORMS = {"p5": 9.0, "p50": 13.0, "p95": 19.0, "p99": 25.0, "max": 31.0}


def example(k: int = 16, expansion: int = 8, name: str = "demo/sae", **changes: Any) -> dict[str, Any]:
    """An evaluation as eval.json holds it."""
    rng = np.random.default_rng(k + expansion)
    positions, frequencies = position_groups(4096), frequency_groups()
    width, latents = 128, 128 * expansion
    edges = np.linspace(-5, 0, 21)
    better = (k * expansion) ** -0.3
    downstream = {**DOWNSTREAM, "loss_recovered": 1 - 0.07 * better, "kl": 0.4 * better}
    reconstruction = {**RECONSTRUCTION, "fvu": 0.5 * better, "l0": 0.98 * k}

    def intervals(values: dict[str, float]) -> dict[str, list[float]]:
        return {key: [0.99 * value, 1.01 * value] for key, value in values.items()}

    def groups(count: int, scale: float) -> list[Any]:
        return [None, *(scale * (1 + 1 / np.arange(1, count)) * rng.uniform(0.95, 1.05, count - 1)).tolist()]

    report: dict[str, Any] = {
        "format": "granary-evaluation",
        "definitions": 1,
        "created": "2026-01-01 00:00 UTC",
        **{key: reconstruction[key] for key in ("fvu", "l0")},
        **{key: downstream[key] for key in ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl")},
        "dead_fraction": 0.011,
        "n_tokens": 204_321,
        "sae": {
            "name": name,
            "path": f"runs/{name}",
            "hook": "layers.2.resid_post",
            "config": {"activation": "topk", "k": k, "d_model": width, "d_latent": latents},
        },
        "reconstruction": {
            **reconstruction,
            "fvu_per_dimension_mean": 0.13,
            "explained_variance_per_dimension_mean": 0.87,
            "constant_dimensions": 0,
            "mse": 0.024,
            "explained_variance": 0.89,
            "explained_variance_uncentred": 0.92,
            "mean_error_norm": 0.01,
            "with_bos": {
                "fvu": 0.06,
                "fvu_uncentred": 0.03,
                "bos_fvu_uncentred": 0.3,
                "n_bos": 420,
                "n_tokens": 204741,
            },
            "n_tokens": 204_321,
            "n_contexts": 50,
            "confidence95": intervals(reconstruction),
        },
        "latents": {
            "d_latent": latents,
            "dead": 11,
            "dense": 3,
            "dead_fraction": 0.011,
            "dense_fraction": 0.003,
            "dense_frequency_bound": 0.1,
            "densest": [{"latent": 7 * i, "frequency": 0.3 / (i + 1), "mean_activation": 1.5} for i in range(10)],
            "histogram": {
                "log10_edges": edges.tolist(),
                "latents": np.histogram(rng.normal(-2.6, 0.6, latents), edges)[0].tolist(),
                "energy_share": [0.05] * 20,
            },
        },
        "decoder": {
            "edges": np.linspace(0, 1, 41).tolist(),
            "nearest": (np.histogram(rng.beta(6, 8, latents), 40, (0, 1))[0] / latents).tolist(),
            "nearest_random": (np.histogram(rng.normal(0.3, 0.02, latents), 40, (0, 1))[0] / latents).tolist(),
            "nearest_median": 0.42,
            "duplicates": 0.01,
        },
        "downstream": {**downstream, "n_predictions": 203_900, "confidence95": intervals(downstream)},
        "breakdown": {
            by: {
                "edges": grouping.edges.tolist(),
                "fvu": groups(grouping.num_bins, 0.1),
                "ce_increase": groups(grouping.num_bins, 0.12),
                "tokens": [9_000] * grouping.num_bins,
                "predictions": [9_000] * grouping.num_bins,
            }
            for by, grouping in (("position", positions), ("frequency", frequencies))
        },
        "activations": {
            "mean_norm": 14.3,
            "median_norm": 13.9,
            "rms_norm": 15.0,
            "max_norm": 800.0,
            "norm_of_mean": 6.0,
            "total_variance": 190.0,
            "variance_in_largest": 0.31,
            "relative_squared_error": 0.0,
            "massive_dimensions": [{"dimension": 31, "rms_ratio": 120.0}, {"dimension": 62, "rms_ratio": 14.2}],
            "store_norm_by_position": [
                {
                    "first": 2 ** (i - 1),
                    "last": 2**i - 1,
                    "tokens": 9_000,
                    "p5": 9.0,
                    "p50": 13.0,
                    "p95": 19.0,
                    "p99": 25.0,
                }
                for i in range(1, 13)
            ],
            "norm_by_position": {
                "edges": positions.edges.tolist(),
                "tokens": [9_000] * positions.num_bins,
                **{name: [scale] * positions.num_bins for name, scale in NORMS.items()},
            },
            "bos_norm": {"tokens": 420, "p50": 710.0, "max": 800.0},
            "largest": {
                "median_rms": 0.4,
                "massive": 2,
                "massive_ratio": 100.0,
                "dimensions": [
                    {"dimension": 31 * i, "max": 60.0 / i, "max_bos": 640.0 / i, "rms": 0.5, "energy_share": 0.1}
                    for i in range(1, 9)
                ],
            },
            "spectrum": {
                "rank": list(range(1, width + 1)),
                "std": np.sort(rng.lognormal(-1, 0.6, width))[::-1].tolist(),
                "abs_mean": np.sort(np.abs(rng.standard_t(2, width)))[::-1].tolist(),
            },
        },
        "training": {
            "tokens": [20_000 * i for i in range(1, 101)],
            "fvu": (0.1 + 0.6 * np.exp(-np.arange(100) / 9)).tolist(),
        },
        "provenance": {
            "model": {"id": "bundled"},
            "corpus": {"description": "Python standard library", "fingerprint": "d" * 64},
            "store": {"url": "runs/demo/store", "plan_hash": "e" * 64, "digest": "f" * 64},
            "sae": {"sha256": "ab" * 32},
        },
        "settings": {"splice_bos": False},
        "environment": {"versions": {"granary": "0.1.0"}},
    }
    return {**report, **changes}


def sweep_page() -> str:
    reports = [example(k, expansion, f"k={k},expansion={expansion}") for k in (8, 16, 32) for expansion in (8, 16)]
    return render_comparison(compare(reports, [f"{report['sae']['name']}/report.html" for report in reports]))


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


@pytest.mark.parametrize("page", [render(example()), sweep_page()], ids=["one", "sweep"])
def test_a_page_loads_nothing(page: str) -> None:
    found = References()
    found.feed(page)
    assert not [load for load in found.loads if not load.startswith(("#", "data:"))]
    assert not found.tags & {"script", "iframe", "object", "embed", "img"}
    assert "http://" not in page
    assert "https://" not in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_everything_from_data_is_escaped() -> None:
    report = example(name=HOSTILE)
    report["provenance"]["corpus"]["description"] = HOSTILE
    report["sae"]["config"]["activation"] = HOSTILE
    report["provenance"]["model"]["id"] = HOSTILE
    for page in (render(report), render_comparison(compare([report], [f"x/{HOSTILE}"]))):
        assert "<script" not in page
        assert "<b>" not in re.sub(r"<b>[\w ]+</b>", "", page)  # but the headings of the chain
        assert html.escape(HOSTILE) in page


def test_identifiers_are_unique_on_a_page() -> None:
    two_hooks = [example(), example(name="other")]
    two_hooks[1]["sae"]["hook"] = "layers.1.resid_post"
    for page in (render(example()), sweep_page(), render_comparison(compare(two_hooks, ["a", "b"]))):
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
    report = example(downstream=None, training=None, **missing)
    report["activations"]["store_norm_by_position"] = []
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
    assert render(example()) == render(example())


def test_a_pareto_front_by_hand() -> None:
    points = [(8, 0.2), (16, 0.1), (16, 0.15), (20, 0.12), (32, 0.1), (64, 0.05)]
    rows = [{"l0": l0, "fvu": fvu, "recovered": 1 - fvu} for l0, fvu in points]
    expected = [(8, 0.2), (16, 0.1), (64, 0.05)]
    assert [(row["l0"], row["fvu"]) for row in pareto_front(rows, "fvu", larger_is_better=False)] == expected
    assert [(row["l0"], row["fvu"]) for row in pareto_front(rows, "recovered", larger_is_better=True)] == expected


def test_ticks_do_not_run_into_one_another() -> None:
    assert apart([8, 16, 32]) == [8, 16, 32]
    assert apart([30, 32, 50, 326, 356]) == [30, 50, 326]
    assert apart([0, 4]) == [0, 4]


def test_every_activation_has_its_line() -> None:
    reports = [example(name=name) for name in ("topk", "batchtopk", "matryoshka")]
    for report, activation in zip(reports, ("topk", "batchtopk", "batchtopk"), strict=True):
        report["sae"]["config"]["activation"] = activation
    reports[2]["sae"]["config"]["prefixes"] = [16, 1024]
    rows = compare(reports, [None] * 3)["rows"]
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


@pytest.mark.parametrize("kind", ["one", "sweep"])
def test_chromium_draws_it_on_a_phone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "page.html").write_text(render(example()) if kind == "one" else sweep_page())
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


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("kind", ["one", "sweep"])
def test_chromium_draws_it_light_and_dark(tmp_path: Path, kind: str, width: int) -> None:
    """Real screenshots, on a desk and on a phone; a window can't be narrower than 500 px, hence the frame."""
    height = 1600
    (tmp_path / "page.html").write_text(render(example()) if kind == "one" else sweep_page())
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
