"""Wide TopK SAEs: held-out FVU and dead latents by recipe and against the peers, and the law of latents and tokens.

    python benchmarks/wide.py [--quick] --work FOLDER [--latents 8192 16384] [--tokens 20_000_000] [--minutes 90]
    python benchmarks/wide.py --work FOLDER --law                # 1,024 to 32,768 latents, 0.5 M to 20 M tokens
    python benchmarks/wide.py --law --recorded --model bundled --figure docs/images/law.png   # of benchmarks/wide.csv

The long study is days of two cores, so it is made to be stopped: with --work a finished row is kept, and --minutes
begins no further row after so long. The same command goes on, on any later day, and from the rows of --csv on
another machine. For each number of latents: our recipes (``RECIPES``) on every seed, then the peers as in
``quality.py``, at their best of the same grid on the same batches, chosen on the validation half. With --grid-tokens
the grid is searched in runs of so many tokens, and at full length on the first seed only its best rate and lower ones
until they are worse, since longer runs want lower rates. The law takes the first recipe, and the first peer at its
best rate for that many latents and tokens, on the first seed; --recorded runs nothing. Harvested once, from the whole
corpus; a longer run passes over it several times. ``dead`` is the share of latents that fire on none of 100,000
held-out tokens, ``dead_in_census`` on none of a million training tokens, with the finished weights.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from law import Law, Point, draw, fit
from quality import LENGTHS, RATES, REALDATA, ROOT, SEEDS, SETTINGS, Bench, Training, groups
from quality_peers import CONTENDERS, EARLY
from records import print_result, read

from shared.store import Store
from stage_train.step.schedule import peak_rate

LATENTS, TOKENS = (8192, 16384), 20_000_000
LAW_LATENTS = (1024, 2048, 4096, 8192, 16384, 32768)
LAW_TOKENS = (500_000, 2_000_000, 8_000_000, 20_000_000)
RECORDED = ROOT / "benchmarks" / "wide.csv"
FIGURE = ROOT / "docs" / "images" / "law.png"
CENSUS = 1_000_000
SCORES = ("fvu", "dead", "dead_in_census", "validation_fvu", "seconds")
COLUMNS = ("model", "latents", "tokens", "provider", "lr", "warmup", "decay", "seed", *SCORES)
BY_WIDTH = partial(peak_rate, "by_width", steps=1)
Overrides = Callable[[int, int, int], list[str]]
"""Of k, latents and tokens."""
RECIPES: dict[str, Overrides] = {
    "granary": lambda k, latents, tokens: [],
    "granary-auxk-8x": lambda k, latents, tokens: ["sae.auxk_alpha=0.25"],
    "granary-auxk-wide": lambda k, latents, tokens: [f"sae.auxk_k={latents // 16}"],
    "granary-auxk-early": lambda k, latents, tokens: [f"sae.dead_after_tokens={tokens // 80}"],
    "granary-no-slope": lambda k, latents, tokens: ["sae.auxk_slope=0.0"],
    "granary-k-falls": lambda k, latents, tokens: [f"schedule.k_start={4 * k}", "schedule.k_warmup=0.2"],
    "granary-batchtopk": lambda k, latents, tokens: ["sae=batchtopk"],
    "granary-by-width": lambda k, latents, tokens: ["optim.lr=by_width"],
    "granary-double-rate": lambda k, latents, tokens: [f"optim.lr={2 * BY_WIDTH(latents)}"],
    "granary-half-rate": lambda k, latents, tokens: [f"optim.lr={BY_WIDTH(latents) / 2}"],
    "granary-quarter-rate": lambda k, latents, tokens: [f"optim.lr={BY_WIDTH(latents) / 4}"],
}
"""Ours, by name: what each has beside the defaults; rates as multiples of ``by_width``."""


class OutOfTimeError(Exception):
    """No further row is begun."""


class Wide(Bench):
    """One recipe of ours, and the peers, at one number of latents and of tokens."""

    def __init__(self, name: str, recipe: str, latents: int, options: argparse.Namespace) -> None:
        super().__init__(name, "sae", options)
        self.provider, self.latents = recipe, latents
        self.parts = (*self.parts, "census")
        self.rows = self.folder / f"{latents}-{options.tokens}"
        self.rows.mkdir(exist_ok=True)
        corpus = [f"corpus.contexts={options.contexts or 'null'}"]
        self.settings = {**self.settings, "harvest": [*self.settings["harvest"], *corpus]}

    def training(self, seed: int) -> tuple[list[str], Path]:
        """That of the recipe."""
        (hook,) = (store := Store.open(str(self.folder / "store"))).hooks
        self.settings["expansion"] = self.latents / store.plan.hooks[hook]
        command, out = super().training(seed)
        return [*command, *RECIPES[self.provider](self.settings["k"], self.latents, self.options.tokens)], out

    def row(self, training: Training, job: dict[str, Any], train: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """One that is known is not run again, and none is begun when the time is over."""
        tokens, recipe = self.options.tokens, training.recipe.values()
        here = (self.name, self.latents, tokens, training.provider, *recipe, training.seed)
        known = next((row for row in self.known_rows() if row[: len(here)] == [str(value) for value in here]), None)

        def in_time() -> dict[str, float]:
            if known:
                return dict(zip(SCORES, map(float, known[len(here) :]), strict=True))
            if time.monotonic() > self.options.until:
                raise OutOfTimeError
            return train()

        found = super().row(training, job, in_time)
        found |= {"latents": self.latents, "tokens": tokens}
        if self.options.csv and not known:
            with self.options.csv.open("a", newline="") as out:
                csv.writer(out, lineterminator="\n").writerow(found[column] for column in COLUMNS)
        return found

    def known_rows(self) -> list[list[str]]:
        """Of the file --csv, which is begun where it is not there."""
        if not self.options.csv:
            return []
        if not self.options.csv.exists():
            self.options.csv.write_text(",".join(COLUMNS) + "\n")
        return list(csv.reader(self.options.csv.open(newline="")))

    def dump_census(self) -> None:
        """Training tokens of contexts from all over the store."""
        contexts = Store.open(str(self.folder / "store")).contexts("train")
        self.dump("census", np.random.default_rng(0).permutation(contexts), CENSUS)

    def best(self, provider: str, seed: int) -> tuple[float, tuple[float, float]]:
        """Of the whole grid, or of the best rate of shorter runs and lower ones."""
        if self.options.grid_tokens in (None, self.options.tokens):
            return super().best(provider, seed)
        short = argparse.Namespace(**{**vars(self.options), "tokens": self.options.grid_tokens})
        grid = Wide(self.name, self.provider, self.latents, short)
        try:
            grid.ours(seed)
            lr, lengths = grid.best(provider, seed)
        finally:
            self.results += grid.results
        grid.drop_batches(seed)
        tried: dict[float, float] = {}
        for rate in reversed(RATES[: RATES.index(lr) + 1]):
            tried[rate] = self.peer(provider, rate, lengths, seed)["validation_fvu"]
            if tried[rate] > min(tried.values()):
                break
        return min(tried, key=lambda rate: tried[rate]), lengths

    def all_peers(self) -> None:
        """Each at its best of the grid on all seeds. Needs our run of each seed, whose batches they see.

        The batches of one seed at a time are on the disk: 10 GB for 20 M tokens of width 128.
        """
        first, *others = self.options.seeds
        best = {provider: self.best(provider, first) for provider in self.options.peers}
        self.drop_batches(first)
        for seed in others:
            for provider, (lr, lengths) in best.items():
                self.peer(provider, lr, lengths, seed)
            self.drop_batches(seed)


def study(model: str, options: argparse.Namespace, benches: list[Bench]) -> None:
    """The rows that were asked for, what matters most first, in `benches` to which they are added."""
    benches.append(prepared(Wide(model, options.recipes[0], options.latents[0], options)))
    for latents in options.latents:
        here = [Wide(model, recipe, latents, options) for recipe in options.recipes]
        benches += here
        for seed in options.seeds:
            for bench in here:
                bench.ours(seed)
        here[0].all_peers()


def law(model: str, options: argparse.Namespace, benches: list[Bench]) -> None:
    """Likewise the points of the law, the cheapest first."""
    benches.append(prepared(Wide(model, options.recipes[0], options.law_latents[0], options)))
    for tokens in options.law_tokens:
        one = argparse.Namespace(**{**vars(options), "tokens": tokens, "seeds": options.seeds[:1]})
        one.peers = options.peers[:1]
        for latents in options.law_latents:
            bench = Wide(model, options.recipes[0], latents, one)
            benches.append(bench)
            bench.ours(one.seeds[0])
            bench.all_peers()


def prepared(bench: Wide) -> Wide:
    """Its store and the tokens that are scored are there."""
    bench.harvest()
    bench.dump_heldout()
    bench.dump_census()
    return bench


def best_rows(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """By trainer, latents and tokens: the seeds of the settings with the least validation FVU, of those with the most
    seeds."""
    settings = groups(rows, ("provider", "latents", "tokens", "lr", "warmup", "decay"))
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for (provider, latents, tokens, *_), mine in settings.items():
        kept = found.setdefault((provider, latents, tokens), mine)
        found[provider, latents, tokens] = min(kept, mine, key=order)
    return found


def order(rows: list[dict[str, Any]]) -> tuple[int, float]:
    """More seeds before fewer, then the lower validation FVU."""
    return -len(rows), mean(row["validation_fvu"] for row in rows)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, each trainer at its best."""
    return [
        {"latents": latents, "tokens": tokens, "provider": provider, "lr": mine[0]["lr"], "seeds": len(mine),
         **{name: round(mean(row[name] for row in mine), 5) for name in ("fvu", "dead", "dead_in_census")}}
        for (provider, latents, tokens), mine in sorted(best_rows(rows).items(), key=lambda item: item[0][1:])
    ]  # fmt: skip


def laws(rows: list[dict[str, Any]]) -> dict[str, tuple[list[Point], Law]]:
    """The points of each trainer with enough of them, and the law fitted to them."""
    found: dict[str, list[Point]] = {}
    for (provider, latents, tokens), mine in best_rows(rows).items():
        found.setdefault(provider, []).append((latents, tokens, mean(row["fvu"] for row in mine)))
    fitted = {}
    for provider, seen in found.items():
        try:
            fitted[provider] = seen, fit(seen)
        except ValueError:
            continue
    return fitted


def recorded(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The points of the law among the rows of --csv."""
    asked = {
        "model": [model],
        "provider": [options.recipes[0], *options.peers[:1]],
        "latents": list(map(str, options.law_latents)),
        "tokens": list(map(str, options.law_tokens)),
        "seed": [str(options.seeds[0])],
    }
    mine = [row for row in read(options.csv) if all(row[column] in asked[column] for column in asked)]
    whole = {"latents": int, "tokens": int, **dict.fromkeys(SCORES, float)}
    return [row | {column: kind(row[column]) for column, kind in whole.items()} for row in mine]


def run_all(model: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """The rows there are, in order, and whether none is left to do."""
    if options.recorded:
        return recorded(model, options), True
    benches: list[Bench] = []
    is_done = True
    try:
        (law if options.law else study)(model, options, benches)
    except OutOfTimeError:
        is_done = False
    return [row for bench in benches for row in bench.results], is_done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 latents, 40,000 tokens, one seed, no peers")
    parser.add_argument("--law", action="store_true", help="the points of the law in place of the comparison")
    parser.add_argument("--model", choices=SETTINGS, nargs="+", help="default: all whose files are here")
    parser.add_argument("--latents", type=int, nargs="+", default=LATENTS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each run (default 20 M)")
    parser.add_argument("--grid-tokens", type=int, help="of the runs by which the peers' rates are chosen")
    parser.add_argument("--law-latents", type=int, nargs="+", default=LAW_LATENTS)
    parser.add_argument("--law-tokens", type=int, nargs="+", default=LAW_TOKENS)
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=["granary"])
    parser.add_argument("--peers", choices=(*CONTENDERS, *EARLY), nargs="*", default=list(CONTENDERS))
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the grid is searched on the first")
    parser.add_argument("--schedules", type=int, default=len(LENGTHS), help="of the peers' grid: 1 or 2 (default)")
    parser.add_argument("--contexts", type=int, help="contexts that are harvested; default: the whole corpus")
    parser.add_argument("--minutes", type=float, help="begin no row after so long")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--work", help="folder for stores, runs and finished rows; default: a temporary one")
    parser.add_argument("--csv", type=Path, help="add each row to this file; the rows in it are not run again")
    parser.add_argument(
        "--recorded", action="store_true", help="with --law: of the rows of --csv alone, nothing is run"
    )
    parser.add_argument("--figure", type=Path, help=f"draw the law there, such as {FIGURE.relative_to(ROOT)}")
    options = parser.parse_args()
    options.heldout = 100_000
    models = options.model or [m for m in SETTINGS if m == "bundled" or REALDATA.exists()]
    if options.quick:
        options.latents, options.tokens, options.seeds, options.peers = (512,), 40_000, (0,), []
        options.heldout, options.law, models = 20_000, False, models[:1]
    if options.recorded:
        if not options.law or options.quick:
            sys.exit("--recorded goes with --law, and not with --quick")
        options.csv = options.csv or RECORDED
    elif options.peers and not Path(options.peers_python).exists():
        sys.exit(f"{options.peers_python} is not there: run `make setup-peers`, name one by --peers-python, or --peers")
    options.until = time.monotonic() + (options.minutes * 60 if options.minutes is not None else float("inf"))
    rows, told = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or temporary
        for model in models:
            mine, is_done = run_all(model, options)
            rows += mine
            fitted = laws(mine)
            texts = {provider: str(found) for provider, (_, found) in fitted.items()}
            told[model] = {"done": is_done, "means": summary(mine), "law": texts}
            if options.figure and fitted:
                draw(fitted, f"{model}, k {SETTINGS[model]['k']}", options.figure.with_stem(f"law_{model}"))
    print_result(told)


if __name__ == "__main__":
    main()
