"""A shuffle buffer: rows of activations in memory, handed out in random order and filled up again.

Shape letters: C rows that fit, N rows that come or go at a time, D features.
"""

import torch
from torch import Tensor

from stage_train.data.stream.permutation import Purpose, random_order


class RowBuffer:
    """The rows of one place. Which go out when is a function of the seed and of how many have come, alone."""

    def __init__(self, capacity: int, like_ND: Tensor, device: torch.device, seed: int) -> None:
        """Rows are kept in the type of `like_ND`, as the model computes them."""
        self.rows_CD = torch.empty(capacity, like_ND.shape[-1], dtype=like_ND.dtype, device=device)
        self.seed = seed
        self._free = torch.arange(capacity)
        self._order = torch.empty(0, dtype=torch.int64)
        """Slots of the rows that are there, in the order in which they go out."""
        self._leftover: Tensor | None = None
        """Rows of the last forward that did not fit."""
        self._shuffles = 0

    def __len__(self) -> int:
        return len(self._order)

    @property
    def room(self) -> int:
        """Rows that could still be added."""
        return len(self._free)

    def add(self, rows_ND: Tensor) -> None:
        """Take rows as far as they fit; the rest is kept until more are added, for `add_leftover`."""
        taken = min(len(rows_ND), self.room)
        slots, self._free = self._free[:taken], self._free[taken:]
        self.rows_CD[slots.to(self.rows_CD.device)] = rows_ND[:taken].to(self.rows_CD)
        self._order = torch.cat([self._order, slots])
        self._leftover = rows_ND[taken:].clone() if taken < len(rows_ND) else None

    def add_leftover(self) -> None:
        """Take what did not fit when rows were added last."""
        if self._leftover is not None:
            self.add(self._leftover)

    def shuffle(self) -> None:
        """Put all rows that are there into another random order."""
        order = random_order(len(self._order), Purpose.BUFFER, self.seed, self._shuffles)
        self._order = self._order[torch.from_numpy(order)]
        self._shuffles += 1

    def take(self, count: int) -> Tensor:
        """The next `count` rows, float32 [N, D], whose places become free."""
        slots, self._order = self._order[:count], self._order[count:]
        self._free = torch.cat([self._free, slots])
        return self.rows_CD[slots.to(self.rows_CD.device)].float()

    def all_rows(self) -> Tensor:
        """The rows that are there, in the order in which they go out."""
        return self.rows_CD[self._order.to(self.rows_CD.device)]
