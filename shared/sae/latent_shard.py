"""Which latents a process holds, and how it meets those that others hold.

``LatentShard`` is all of them, and does nothing; a latent-parallel layout gives each rank another. The losses are
written once, against this interface.
"""

from torch import Tensor

from shared.kernels import LatentRanks, smallest_kept
from shared.sae.contexts import Given
from shared.sae.groups import LatentGroup


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

    # What the start of learning asks of one group

    def written(self, group: LatentGroup, values_NK: Tensor, indices_NK: Tensor, read: Given) -> Tensor:
        """What picks decode to, [N, D_out]: those of all parts, of which each gives its own in the whole's slots."""
        return group.written(values_NK, indices_NK, read=read)

    def least_of_largest(self, values_NK: Tensor, indices_NK: Tensor, count: int) -> Tensor:
        """The least of the `count` largest values of all parts, each of which gives its own `count` largest."""
        return smallest_kept(values_NK, indices_NK)


WHOLE = LatentShard()
