"""Which lane gives how many tokens to which batch: exact, stateless, O(lanes).

Lane l has n_l tokens in the epoch, N in all. Its token j (0-based) has the virtual time (j + 1/2) / n_l, and the
epoch's global order sorts tokens by (time, lane): every lane advances at the rate that makes all of them end together,
and how many tokens of each lane are among the first G of the order can be written down without walking there.
Only integers are compared, so no rounding can make two processes disagree.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction


class Apportionment:
    """The global token order of lanes with the given token counts."""

    def __init__(self, lane_tokens: Sequence[int]) -> None:
        self.lane_tokens = [int(n) for n in lane_tokens]
        self.num_tokens = sum(self.lane_tokens)

    def counts_at(self, position: int) -> list[int]:
        """How many tokens of each lane are among the first `position` tokens of the global order.

        `position` is in [0, num_tokens]; the result sums to it, and never decreases with it.
        """
        total = self.num_tokens
        if not 0 <= position <= total:
            raise ValueError(f"position {position} is outside [0, {total}]")
        # Tokens with (2j+1)/(2 n_l) < position/total; the sum is off by at most half a token per lane.
        counts = [max(0, -((total - 2 * position * n) // (2 * total))) if n else 0 for n in self.lane_tokens]
        excess = sum(counts) - position
        if excess < 0:
            self._add(counts, -excess)
        elif excess > 0:
            self._remove(counts, excess)
        return counts

    def position_of(self, lane: int, token: int) -> int:
        """The place of a lane's token in the global order, the inverse of counts_at."""
        numerator, own = 2 * token + 1, self.lane_tokens[lane]
        position = 0
        for other, n in enumerate(self.lane_tokens):
            # Tokens j of the other lane with (2j+1) own < numerator n, ties won by the lower lane.
            bound = numerator * n - own
            before = bound // (2 * own) + 1 if other < lane else -(-bound // (2 * own))
            position += min(max(before, 0), n) if other != lane else token
        return position

    def _time(self, lane: int, token: int) -> Fraction:
        return Fraction(2 * token + 1, 2 * self.lane_tokens[lane])

    def _add(self, counts: list[int], missing: int) -> None:
        """Take the next `missing` tokens of the global order."""
        heap = [(self._time(i, counts[i]), i) for i, n in enumerate(self.lane_tokens) if counts[i] < n]
        heapq.heapify(heap)
        for _ in range(missing):
            lane = heap[0][1]
            counts[lane] += 1
            if counts[lane] < self.lane_tokens[lane]:
                heapq.heapreplace(heap, (self._time(lane, counts[lane]), lane))
            else:
                heapq.heappop(heap)

    def _remove(self, counts: list[int], excess: int) -> None:
        """Give back the last `excess` tokens of those taken."""
        heap = [(-self._time(i, counts[i] - 1), -i) for i in range(len(counts)) if counts[i] > 0]
        heapq.heapify(heap)
        for _ in range(excess):
            lane = -heap[0][1]
            counts[lane] -= 1
            if counts[lane] > 0:
                heapq.heapreplace(heap, (-self._time(lane, counts[lane] - 1), -lane))
            else:
                heapq.heappop(heap)
