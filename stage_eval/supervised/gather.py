"""The activations of the drawn tokens, read once for all dictionaries.

Each rank reads its own contexts; a row is filled by one rank alone, so the sum over ranks is exact. N drawn tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.parallel import all_reduce_sum
from shared.store.ahead import read_ahead
from stage_eval.measure.passes import progress
from stage_eval.measure.session import Session
from stage_eval.supervised.sample import Sample


def gather(sample: Sample, sites: Sequence[str], session: Session) -> dict[str, Tensor]:
    """Activations [N, D] of each site, float32 in host memory, the same on every rank."""
    store, data = session.store, session.data
    found = {site: torch.zeros(len(sample), len(session.statistics[site].mean)) for site in sites}
    first = np.searchsorted(sample.context_N, np.arange(len(data.contexts) + 1))
    own = [context for start, stop in session.units() for context in range(start, stop)]
    own = [context for context in own if first[context] < first[context + 1]]
    reads = read_ahead(store, ((int(data.contexts[context]), sites) for context in own))
    with progress("labelled tokens", [(context, context + 1) for context in own], 1, session) as bar:
        for context, read in zip(own, reads, strict=True):
            rows = slice(first[context], first[context + 1])
            position = torch.from_numpy(sample.position_N[rows])
            for site, x_TD in read.items():
                found[site][rows] = x_TD[position].float()
            bar.update(store.seq_len)
    for x_ND in found.values():
        all_reduce_sum(x_ND)
    return found
