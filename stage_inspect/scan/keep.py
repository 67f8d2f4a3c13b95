"""The K smallest keys of each latent: what may still belong to the result, and what can't any more.

Only keys are held. A record is dropped when K records of its latent with smaller keys have been seen, wherever they
came from, so what is kept always contains the true K smallest of the store.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint32]

LARGEST = np.uint32(2**32 - 1)
LEAST_PENDING = 1 << 18
ROWS = 1 << 14  # brought up to date at a time


class Smallest:
    """[F, K] keys, and the largest of each row that is still wanted."""

    def __init__(self, num_latents: int, count: int) -> None:
        self.keys_FK = np.full((num_latents, count), LARGEST)
        self._pending: list[tuple[Ints, Keys]] = []
        self._size = 0
        self._limit = max(LEAST_PENDING, self.keys_FK.size // 8)

    def wanted(self, latent: Ints, key: Keys) -> npt.NDArray[np.bool_]:
        """Whether each record may still belong to the K smallest; equal keys may."""
        wanted: npt.NDArray[np.bool_] = key <= self.keys_FK[latent, -1]
        return wanted

    def add(self, latent: Ints, key: Keys) -> None:
        """Records that are kept."""
        self._pending.append((latent, key))
        self._size += len(latent)
        if self._size >= self._limit:
            self.update()

    def update(self) -> None:
        """Let the records added so far count."""
        if not self._size:
            return
        K = self.keys_FK.shape[1]
        latent = np.concatenate([one for one, _ in self._pending])
        rows, row = np.unique(latent, return_inverse=True)
        new = np.sort(row.astype(np.uint64) << np.uint64(32) | np.concatenate([key for _, key in self._pending]))
        self._pending, self._size = [], 0
        counts = np.bincount(row, minlength=len(rows))
        ends = np.append(0, np.cumsum(counts))
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            old = np.arange(start, start + len(some), dtype=np.uint64)[:, None] << np.uint64(32) | self.keys_FK[some]
            merged = np.sort(np.concatenate([old.reshape(-1), new[ends[start] : ends[start + len(some)]]]))
            first = ends[start : start + len(some)] - ends[start] + K * np.arange(len(some))
            self.keys_FK[some] = merged[first[:, None] + np.arange(K)].astype(np.uint32)
