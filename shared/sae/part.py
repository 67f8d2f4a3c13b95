"""Which latents an SAE object holds, and how it meets those that others hold.

``Part`` is all of them, and does nothing; a latent-parallel layout gives each rank another. The steps in this package
are written once, against this interface.
"""

from torch import Tensor


class Part:
    """The whole dictionary in one process."""

    first = 0
    """Index, in the whole dictionary, of the first latent held here."""

    def sum_forward(self, partial: Tensor) -> Tensor:
        """The sum over all parts, for a loss that every rank then computes alike: gradients pass as they are."""
        return partial

    def sum_backward(self, shared: Tensor) -> Tensor:
        """A replicated tensor for use on the latents held here: its gradient is summed over all parts."""
        return shared

    def count_dead(self, held: int) -> int:
        """Dead latents of the whole dictionary, of which `held` are here."""
        return held

    def kth_largest(self, values_NR: Tensor, k: int) -> Tensor:
        """The k-th largest of each row over all parts: [N, 1]. There are at least k, none of them negative."""
        return values_NR.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


WHOLE = Part()
