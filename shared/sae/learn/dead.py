"""Which latents are dead: tokens seen, over all ranks, since each latent was last nonzero. Which of them AuxK takes.

Shapes: F latents, R dead ones.
"""

import torch
from torch import Tensor

from shared.sae.sites import SiteWidths

# Of the dead latents' rows in one matrix; AuxK makes about seven copies: 3.8 GB. It is part of what fixes the result.
DEAD_ELEMENTS = 1 << 27


class DeadLatents:
    """Counts tokens since each latent's last nonzero activation.

    Call ``update`` once per optimiser step. A rank counts all tokens of the global batch but only its own firings: the
    least of the ranks' counts is the global one.
    """

    def __init__(self, num_latents: int, dead_after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.dead_after_tokens = dead_after_tokens
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired_F: Tensor, num_tokens: int) -> None:
        """Record a batch: bool `fired_F`, nonzero on any token of this rank; `num_tokens` are those of all ranks."""
        self.tokens_since_fired += num_tokens
        self.tokens_since_fired.masked_fill_(fired_F, 0)

    def mask(self) -> Tensor:
        """bool [F], true where dead."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def fraction(self) -> Tensor:
        """Share of dead latents, a scalar tensor."""
        return self.mask().float().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The counters."""
        return {"tokens_since_fired": self.tokens_since_fired}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the counters back, in place."""
        self.tokens_since_fired.copy_(state["tokens_since_fired"])


def most_dead(widths: SiteWidths) -> int:
    """How many dead latents AuxK has at a time on one rank: as many as keep what it makes of their rows bounded."""
    return max(1, DEAD_ELEMENTS // max(widths.d_in, widths.d_out))


def in_turn(dead_R: Tensor, most: int, turn: int) -> Tensor:
    """`most` of them if they are more, others at each turn: after ``ceil(R / most)`` turns each has been there."""
    num_dead = len(dead_R)
    if num_dead <= most:
        return dead_R
    return dead_R.roll(-(turn * most) % num_dead)[:most]
