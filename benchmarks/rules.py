"""Seconds of finding a rule for each latent of a run, and of scoring them, part by part.

    python benchmarks/rules.py runs/demo           # all latents on half a million tokens: the bound is 120 s on 2 cores
    python benchmarks/rules.py runs/demo --quick   # 128 latents on 100,000 tokens
    python benchmarks/rules.py RUN RUN --table     # no timing: the table of docs/explanations.md, from the notes

The notes are not written. The last line is one JSON object.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from records import print_result

from shared.basics.config import Split
from shared.latents.folder import Latents
from shared.latents.notes import RULE
from shared.store.choose import choose_contexts
from stage_inspect.concepts.search import Inspected
from stage_inspect.explain.rules.command import rules
from stage_inspect.explain.rules.corpus import choose_runs, read
from stage_inspect.find import latents_url

HEAD = """\
| dictionary | latents with a rule | F1: quartiles, median between | 0.5 or more | 0.8 or more | median of "any token" |
|---|---|---|---|---|---|"""


def row(run: str) -> str:
    """One dictionary's line of the table; shares are of all its latents."""
    latents = Latents.open(latents_url(run))
    said = [one.id for one in latents.notes.explanations() if one.method == RULE]
    scores = [score for number in said for score in latents.notes.scores(number) if score.value is not None]
    values = np.array([score.value for score in scores])
    chance = np.median([score.details["controls"]["empty"]["value"] for score in scores])
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    shares = " | ".join(f"{100 * (values >= bar).sum() / latents.num_latents:.0f} %" for bar in (0.5, 0.8))
    name = f"{latents.meta.model.get('id', run).rpartition('/')[2]}, {latents.meta.dictionary['reads'][0]}"
    found = f"{len(scores):,} of {latents.num_latents:,}"
    return f"| {name} | {found} | {low:.2f}, {middle:.2f}, {high:.2f} | {shares} | {chance:.3f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="a run's folder, with its latents; timed is the first")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join([HEAD, *map(row, arguments.run)]))
        return
    inspected = Inspected.open(Latents.open(latents_url(arguments.run[0])), None, None)
    tokens, latents = (100_000, 128) if arguments.quick else (500_000, inspected.latents.num_latents)
    store = inspected.store
    busy, begin = time.process_time(), time.perf_counter()
    runs = choose_runs(choose_contexts(store, Split.all, None), store.seq_len, tokens)
    corpus = read(inspected, runs, python=None, tell=lambda _: None)
    read_at = time.perf_counter()
    made = rules(inspected, corpus, list(range(latents)), lambda _: None)
    end = time.perf_counter()
    found = {
        "latents": latents,
        "rules": len(made),
        "tokens": corpus.train.num_tokens + corpus.heldout.num_tokens,
        "read_s": round(read_at - begin, 2),
        "rules_s": round(end - read_at, 2),
        "total_s": round(end - begin, 2),
        "busy_s": round(time.process_time() - busy, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print_result(found)


if __name__ == "__main__":
    main()
