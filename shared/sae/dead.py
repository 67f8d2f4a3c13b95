"""Which latents are dead: tokens seen, over all ranks, since each latent was last nonzero."""

from collections.abc import Callable

import torch


class DeadLatents:
    """Counts tokens since each latent's last nonzero activation.

    Call ``update`` once per optimiser step on every rank; counts are global because `num_tokens` is the global batch
    and `reduce_max` merges which latents fired.
    """

    def __init__(self, num_latents: int, dead_after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.dead_after_tokens = dead_after_tokens
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self,
        indices_NK: torch.Tensor,
        num_tokens: int,
        reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Record a batch: `indices_NK` are this rank's picks (-1: nothing fired), `num_tokens` all ranks' tokens.

        `reduce_max` takes an int32 tensor to its elementwise maximum over ranks. No host synchronisation.
        """
        num_latents = self.tokens_since_fired.numel()
        # The extra slot takes the padding.
        fired = torch.zeros(num_latents + 1, dtype=torch.int32, device=self.tokens_since_fired.device)
        fired[indices_NK.reshape(-1)] = 1  # -1 is the last slot
        fired = fired[:num_latents]
        if reduce_max is not None:
            fired = reduce_max(fired)
        self.tokens_since_fired += num_tokens
        self.tokens_since_fired.masked_fill_(fired > 0, 0)

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
