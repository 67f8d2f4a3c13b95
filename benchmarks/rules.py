"""Seconds of finding a rule for each latent of a run, and of scoring them, part by part.

    python benchmarks/rules.py runs/demo           # all latents on half a million tokens: the bound is 120 s on 2 cores
    python benchmarks/rules.py runs/demo --quick   # 128 latents on 100,000 tokens

The notes are not written. The last line is one JSON object.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from records import processor

from shared.basics.config import Split
from shared.latents.folder import Latents
from shared.store.choose import choose_contexts
from stage_inspect.concepts.search import Inspected
from stage_inspect.explain.rules.command import rules
from stage_inspect.explain.rules.corpus import choose_runs, read
from stage_inspect.find import latents_url


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, with its latents")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    inspected = Inspected.open(Latents.open(latents_url(arguments.run)), None, None)
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
        "processor": processor(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
