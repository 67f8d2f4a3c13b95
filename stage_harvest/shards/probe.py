"""The probe before a harvest with ``packing=isolated``: does this model, loaded like this, isolate packed documents?

It costs at most `most_tokens` tokens packed and the same alone (twice in 16 bits), and one context more, so never more
than a few contexts of the harvest, whose shards hold dozens.
"""

import logging

import numpy as np
import torch
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.isolation import Isolation, measure_isolation, position_limits, probe_lengths
from stage_harvest.job import HarvestJob
from stage_harvest.shards.forward import FORWARD_TOKENS

log = logging.getLogger(__name__)

REMEDY = "packing=separate gives each document a context of its own"


def most_tokens(seq_len: int) -> int:
    """Tokens in the packed contexts of the probe: two contexts, or two forwards of the least size if that is more.

    Two, because a document beyond one limit may fill a context, and the short ones need room beside it.
    """
    return 2 * max(seq_len, FORWARD_TOKENS)


def probe_documents(job: HarvestJob, device: torch.device) -> list[torch.Tensor]:
    """Random token ids, the same for every process, beginning with BOS where the harvest's documents do."""
    lengths = probe_lengths(job.config, job.cfg.packing.seq_len, most_tokens(job.cfg.packing.seq_len))
    ordinary = np.setdiff1d(np.arange(job.config.vocab_size), job.special.all)
    rng = np.random.default_rng(0)
    documents = []
    for length in lengths:
        ids_L = rng.choice(ordinary if ordinary.size else np.arange(job.config.vocab_size), length)
        if job.packer.bos_id is not None:
            ids_L[0] = job.packer.bos_id
        documents.append(torch.from_numpy(ids_L.astype(np.int64)).to(device))
    return documents


def probe(job: HarvestJob, trunk: PreTrainedModel, device: torch.device) -> Isolation:
    """Measure, and raise GranaryError with the remedy where documents do not have the activations they have alone.

    With tensor parallelism every rank of a replica must call it.
    """
    seq_len = job.cfg.packing.seq_len
    documents = probe_documents(job, device)
    what = f"packing=isolated does not hold for this model ({job.config.model_type}, {attention_name(trunk)} attention)"
    # Eager attention isolates by the model's own masks, which serve some families that sdpa does not.
    remedy = REMEDY + (", model.attn_implementation=eager may isolate" if attention_name(trunk) == "sdpa" else "")
    try:
        found = measure_isolation(trunk, job.points, documents, seq_len=seq_len, batch_contexts=job.batch_contexts)
    except GranaryError as error:
        raise GranaryError(f"{what}: {error}; {remedy}") from error
    if not found.holds:
        raise GranaryError(
            f"{what}: {found.where} differ from the document alone by {found.worst:.2g}, relative, where"
            f" {found.tolerance:.0e} is tolerated; {remedy}"
        )
    longest = max(map(len, documents))
    uncrossed = [limit for limit in position_limits(job.config) if longest <= limit < seq_len]
    beyond = f"; not tried beyond {uncrossed[0]:,} positions" if uncrossed else ""
    log.info("%-9s %s%s", "isolated", found.summary(), beyond)
    return found


def attention_name(trunk: PreTrainedModel) -> str:
    """The attention implementation as the user names it."""
    name = str(trunk.config._attn_implementation)
    return "sdpa" if name.endswith("_sdpa") else name
