"""The best pairs of a batch so far: what both tiled forms of ``encode_batchtopk`` keep between tiles.

Shapes: P pairs.
"""

import torch


class Pool:
    """Keeps the `capacity` largest pairs of all that are added; of equal values the lower row, then the lower latent.

    ``bar`` rises with the pool: a pair below it, or not positive, can't be among the largest and need not be added.
    """

    def __init__(self, capacity: int, num_latents: int, like: torch.Tensor) -> None:
        self.capacity, self._num_latents = capacity, num_latents
        self.bar = torch.zeros((), dtype=like.dtype, device=like.device)
        self._empty = torch.empty(0, dtype=torch.int64, device=like.device)
        self._parts = [(self._empty, self._empty, like.new_empty(0))]

    def add(self, rows_P: torch.Tensor, latents_P: torch.Tensor, values_P: torch.Tensor) -> None:
        """Take pairs in; cuts down to the capacity when more than twice as many have come together."""
        self._parts.append((rows_P, latents_P, values_P))
        if sum(values.numel() for _, _, values in self._parts) > 2 * self.capacity:
            self._cut()

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, latents and values of the pairs kept, in no particular order."""
        self._cut()
        return self._parts[0]

    def _cut(self) -> None:
        rows_P, latents_P, values_P = (torch.cat(part) for part in zip(*self._parts, strict=True))
        if values_P.numel() > self.capacity:
            keys_P = values_P.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a NaN must not be hidden
            last = keys_P.topk(self.capacity, sorted=False).values.amin()
            kept_P = keys_P > last
            ties_T = (keys_P == last).nonzero().squeeze(1)
            flat_T = rows_P[ties_T] * self._num_latents + latents_P[ties_T]
            num_ties = self.capacity - int(kept_P.sum())
            kept_P[ties_T[flat_T.argsort()[:num_ties]]] = True
            rows_P, latents_P, values_P = rows_P[kept_P], latents_P[kept_P], values_P[kept_P]
            self.bar = last
        self._parts = [(rows_P, latents_P, values_P)]
