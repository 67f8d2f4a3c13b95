"""How the tokens are spread over the latents of a MoLT: a few maps that take all of them are its way to fail.

    load/max         share of the tokens on which the busiest transform is on
    load/effective   exp of the entropy of how the picks are shared out: as many transforms, equally busy, would have it
    load/RANK        share of the picks that go to transforms of this rank

Each is of a micro-batch. Where every token turns on the same transforms, load/effective is L0.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.sae.config import DictionaryConfig
from shared.sae.variants.molt import MoLTConfig

if TYPE_CHECKING:
    from shared.sae.learn.terms import LossTerms

# L0 over load/effective, from which on nearly every token turns on the same transforms.
COLLAPSED = 0.8


def load_names(config: DictionaryConfig) -> tuple[str, ...]:
    """Return the names of the metrics of the load."""
    if not isinstance(config, MoLTConfig):
        return ()
    return ("load/max", "load/effective", *(f"load/{rank}" for rank in config.ranks))


@torch.no_grad()
def load_of_maps(terms: "LossTerms", counts_F: Tensor, rows: int) -> dict[str, Tensor]:
    """The metrics, from on how many of the `rows` each latent held here is on; the same on all parts."""
    config = terms.dictionary.config
    assert isinstance(config, MoLTConfig)
    whole_F = torch.zeros(config.d_latent, device=counts_F.device)
    whole_F[terms.shard.first : terms.shard.first + len(counts_F)] = counts_F.float()
    whole_F = terms.shard.sum_forward(whole_F)
    share_F = whole_F / whole_F.sum().clamp_min(1)
    rank_F = torch.tensor(config.rank_of_each, device=counts_F.device)
    found = {"load/max": whole_F.max() / rows, "load/effective": torch.special.entr(share_F).sum().exp()}
    return found | {f"load/{rank}": (share_F * (rank_F == int(rank))).sum() for rank in config.ranks}


def collapse(config: DictionaryConfig, means: Mapping[str, float]) -> str | None:
    """What to say where a MoLT has collapsed, from the metrics of some steps; None where it has not."""
    effective, l0 = means.get("load/effective"), means.get("l0", 0.0)
    if effective is None or config.d_latent <= 2 * l0 or l0 < COLLAPSED * effective:
        return None
    return (
        f"nearly every token turns on the same transforms: {effective:.1f} of {config.d_latent} do all the work, of "
        f"{l0:.1f} that are on at a time. Raise sae.auxk_alpha, lower sae.dead_after_tokens or optim.lr, or give fewer "
        "transforms (variant.ranks)"
    )
