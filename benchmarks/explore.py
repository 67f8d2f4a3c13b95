"""The explorer at a quarter of a million latents: how long its server takes, and how much a page weighs.

    python benchmarks/explore.py            # 262,144 latents and as many explanations
    python benchmarks/explore.py --quick    # 65,536, under a minute

The folder is made up: 228 examples of 64 tokens for each of 4,096 latents, and for all an explanation of 12 words out
of 4,000, the n-th of which is as frequent as 1 / n. One client asks the real server over HTTP on this machine, one
question at a time. A page is that of a latent that was not asked for before; the server has answered others. Filter and
sort are those of the table, run by the page's own module in a real Chromium, where there is one. The last line is one
JSON object; times are in milliseconds, `busy` ones of processor time, which other users of the machine do not change.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from records import print_result

from shared.latents import Latents
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.server import Run
from tests.browser.chromium import chromium_and_driver, open_browser
from tests.exploring import Client, serving
from tests.latents import synthetic_latents

FULL, QUICK = 262_144, 65_536
RECORDED, TOP, SAMPLE, WINDOW, WINDOWS = 4096, 100, 128, 64, 8192
PAGES = 200
WORDS = [f"word{number}" for number in range(1, 4001)]
QUERIES = ("word3 word70", "word12", "word250", "word3999", "word8 word9 word10", "nothing like it")

# Sort by one column, filter by two others, as the table does; least and median of some rounds.
TABLE = """
const done = arguments[arguments.length - 1];
(async () => {
  const [{ order, filter }, { open }] = await Promise.all([import('/static/sort.js'), import('/static/data.js')]);
  const source = await open();
  const [density, max, mean] = await Promise.all(['density', 'max', 'mean'].map((name) => source.column(name)));
  const times = [];
  for (let round = 0; round < 15; round += 1) {
    const start = performance.now();
    const rows = filter(order(density, true), [{ column: max, low: 1, high: 8 }, { column: mean, low: .1, high: 5 }]);
    times.push(performance.now() - start);
  }
  times.sort((one, other) => one - other);
  done([times[0], times[7]]);
})();
"""


def main() -> None:
    """Make the folder, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    num_latents = QUICK if parser.parse_args().quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        latents = synthetic_latents(
            Path(folder) / "latents",
            num_latents,
            top=TOP,
            sample=SAMPLE,
            num_windows=WINDOWS,
            window=WINDOW,
            recorded=RECORDED,
        )
        explain(latents)
        print(f"a made-up folder of {num_latents:,} latents: {time.perf_counter() - began:.1f} s", flush=True)
        with serving([Run(Documents(Latents.open(latents.url), "benchmark"), None)]) as client:
            found = {"latents": num_latents, **pages(client), **columns(client), **searches(client), **table(client)}
    for name, value in found.items():
        print(f"{name:>24}  {value}")
    print_result(found)


def explain(latents: Latents) -> None:
    """An explanation of 12 words for every latent."""
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, len(WORDS) + 1)
    words = rng.choice(WORDS, (latents.num_latents, 12), p=frequency / frequency.sum())
    rows = [(latent, " ".join(row), "benchmark", "nobody", {}) for latent, row in enumerate(words.tolist())]
    latents.notes.add_explanations(rows)


def pages(client: Client) -> dict[str, Any]:
    """Latents' pages: time of the server's answer, and bytes."""
    chosen = np.random.default_rng(1).permutation(RECORDED)[: PAGES + 20].tolist()
    for latent in chosen[:20]:
        client.get(f"/data/latent/{latent}.json")
    weights: list[int] = []

    def ask(latent: int) -> None:
        weights.append(client.get(f"/data/latent/{latent}.json").transferred)

    times = [timed(lambda latent=latent: ask(latent)) for latent in chosen[20:]]
    return {**summary("page", times), "page_kb_largest": round(max(weights) / 1000, 1)}


def columns(client: Client) -> dict[str, Any]:
    """One column of the table, as bytes."""
    client.get("/data/column/max.f4")
    return summary("column", [timed(lambda: client.get("/data/column/max.f4")) for _ in range(10)])


def searches(client: Client) -> dict[str, Any]:
    """Searches for words in the explanations."""
    times = [timed(lambda query=query: client.get(f"/api/search?q={quote(query)}")) for query in QUERIES * 5]
    return summary("search", times[len(QUERIES) :])


def table(client: Client) -> dict[str, Any]:
    """Sort and filter of all rows in the browser."""
    if chromium_and_driver() is None:
        return {"sort_and_filter_ms": None, "sort_and_filter_note": "no Chromium here"}
    with open_browser() as browser:
        browser.go(f"{client.origin}/#/overview")
        least, middle = browser.driver.execute_async_script(TABLE)
    return {"sort_and_filter_ms": round(middle, 1), "sort_and_filter_ms_least": round(least, 1)}


def timed(ask: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds that passed, and that this process, client and server, was busy."""
    start, busy = time.perf_counter(), time.process_time()
    ask()
    return 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - busy)


def summary(name: str, times: list[tuple[float, float]]) -> dict[str, float]:
    """Median and 95th percentile of what passed, median of what was busy."""
    passed, busy = (list(column) for column in zip(*times, strict=True))
    return {
        f"{name}_ms": round(statistics.median(passed), 1),
        f"{name}_ms_p95": round(sorted(passed)[int(0.95 * (len(passed) - 1))], 1),
        f"{name}_busy_ms": round(statistics.median(busy), 1),
    }


if __name__ == "__main__":
    main()
