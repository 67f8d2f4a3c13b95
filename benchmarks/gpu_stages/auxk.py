"""Stage ``auxk``: time and memory of a step of shape b where a thousandth, a tenth and all of the latents are dead.

AuxK takes so many of the dead at a time that what it makes of their rows is bounded (``shared.sae.learn.dead``).
Predicted: 5.7, 6.8 and 7.5 GB of live tensors above weights and moments (``benchmarks/gpu_counts.py --shapes b --quiet
1000 10 1``); the step takes about 110 and 155 ms longer than the first (products at 780 TFLOP/s, the rest at 3 TB/s).
"""

import gc

from step_providers import make_batch

from gpu_stages.context import Context
from gpu_stages.steps import measure

QUIET = (1000, 10, 1)
"""One latent in so many is dead."""


def run(context: Context) -> None:
    """The fewest first."""
    shape = context.shape("b")
    x = make_batch(shape, context.device)
    for quiet in QUIET:
        measure(context, shape, x, f"1 of {quiet} dead", quiet=quiet)
        gc.collect()  # what is left of a trainee, before the next one is made
