"""One contender in a process of its own: its memory is its own, and it steps when it is told to.

    python benchmarks/step_worker.py PROVIDER D F K N THREADS

Answers each line on stdin with one line of JSON: ``step`` with the seconds one step took, ``peak`` with the process's
largest resident size in MB. Started by ``benchmarks/step.py``.
"""

import json
import resource
import sys
import time
import warnings

import torch
from step_providers import PROVIDERS, Shape
from step_variants import VARIANT_PROVIDERS


def main() -> None:
    provider, *numbers = sys.argv[1:]
    d_model, d_latent, k, batch, threads = map(int, numbers)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    answer = sys.stdout
    sys.stdout = sys.stderr  # what a peer prints is no answer
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = (PROVIDERS | VARIANT_PROVIDERS)[provider](Shape(d_model, d_latent, k, batch))
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            value = step()
            reply = {"seconds": time.perf_counter() - start, "value": value}
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            reply = {"peak_mb": peak, "baseline_mb": baseline, "torch": torch.__version__}
        print(json.dumps(reply), file=answer, flush=True)


if __name__ == "__main__":
    main()
