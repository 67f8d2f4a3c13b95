"""Which latents are dead: tokens seen, over all ranks, since each latent was last nonzero."""

import torch


class DeadLatents:
    """Counts tokens since each latent's last nonzero activation.

    Call ``update`` once per optimiser step. A rank counts all tokens of the global batch but only its own firings: the
    least of the ranks' counts is the global one.
    """

    def __init__(self, num_latents: int, dead_after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.dead_after_tokens = dead_after_tokens
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired_F: torch.Tensor, num_tokens: int) -> None:
        """Record a batch: bool `fired_F`, nonzero on any token of this rank; `num_tokens` are those of all ranks."""
        self.tokens_since_fired += num_tokens
        self.tokens_since_fired.masked_fill_(fired_F, 0)

    def mask(self) -> torch.Tensor:
        """bool [F], true where dead."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def fraction(self) -> torch.Tensor:
        """Share of dead latents, a scalar tensor."""
        return self.mask().float().mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counters."""
        return {"tokens_since_fired": self.tokens_since_fired}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put the counters back, in place."""
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
