"""Which latents a process holds, and how it meets those that others hold.

``LatentShard`` is all of them, and does nothing; a latent-parallel layout gives each rank another. The losses are
written once, against this interface.
"""

from torch import Tensor

from shared.kernels import LatentRanks


class LatentShard(LatentRanks):
    """The whole dictionary in one process."""

    first = 0
    """Index, in the whole dictionary, of the first latent held here."""

    def sum_backward(self, shared: Tensor) -> Tensor:
        """A replicated tensor for use on the latents held here: its gradient is summed over all parts."""
        return shared

    def count_dead(self, held: int) -> int:
        """Dead latents of the whole dictionary, of which `held` are here."""
        return held


WHOLE = LatentShard()
