"""The order of one epoch: contexts dealt to lanes, lanes cut in groups, groups shuffled, lanes merged into batches.

Everything here is a pure function of (trainable tokens per context, StreamOrder, epoch). The number of processes does
not appear: a process serves some of the lanes, and does nothing else differently.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from stage_train.data.stream.apportion import Apportionment
from stage_train.data.stream.permutation import Purpose, effective_lanes, group_starts, random_order


class Order(Protocol):
    """What fixes the order of a stream, beside its data: a frozen dataclass."""

    @property
    def batch_size(self) -> int:
        """Tokens per global batch, or positions of whole contexts."""

    @property
    def seed(self) -> int:
        """Same seed, same order."""

    @property
    def contexts_held(self) -> int:
        """Contexts that all ranks together have in use."""

    @property
    def batches_alike(self) -> bool:
        """Whether all batches but an epoch's last have equally many tokens, whatever the epoch."""

    def plan(self, counts: NDArray[np.int64], contexts: NDArray[np.int64], epoch: int) -> "Plan":
        """The order of an epoch that reads these contexts."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Plan(Protocol):
    """The order of one epoch."""

    order: Any
    epoch: int
    num_batches: int
    num_tokens: int
    """Trainable tokens of its contexts, those of a batch that is dropped included."""

    def tokens_before(self, batch: int) -> int:
        """Trainable tokens of the batches before `batch`."""

    def batches_for(self, tokens: int) -> int:
        """The fewest batches that hold `tokens` tokens."""


def too_few_tokens(plan: Plan) -> GranaryError:
    """What to raise for an epoch that has no batch."""
    return GranaryError(
        f"an epoch has {plan.num_tokens} tokens, fewer than one batch of {plan.order.batch_size}: "
        "use a smaller stream.batch_size or stream.drop_last=false"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOrder:
    """What fixes the order of a stream, beside its data."""

    batch_size: int
    """Tokens per global batch."""
    seed: int
    """Same seed, same order."""
    lanes: int = 64
    """Virtual readers; halved for stores with fewer contexts than lanes."""
    mix_contexts: int = 4
    """Contexts whose tokens a lane mixes at a time."""
    drop_last: bool = False
    """Leave out an epoch's last batch when it is short."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "mix_contexts"):
            if getattr(self, name) < 1:
                raise GranaryError(f"stream.{name}={getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise GranaryError(f"seed={self.seed}: it must not be negative")

    @property
    def contexts_held(self) -> int:
        """Contexts that all ranks together are mixing."""
        return self.lanes * self.mix_contexts

    @property
    def batches_alike(self) -> bool:
        """They have."""
        return True

    def plan(self, counts: NDArray[np.int64], contexts: NDArray[np.int64], epoch: int) -> "EpochPlan":
        """The order of an epoch that reads these contexts."""
        return EpochPlan(counts, contexts, self, epoch)


class Lane:
    """One virtual reader's epoch: its contexts in order, cut into groups."""

    def __init__(self, lane: int, contexts: NDArray[np.int64], counts: NDArray[np.int64], mix_contexts: int) -> None:
        self.lane = lane
        self.contexts = contexts
        self.group_contexts = group_starts(len(contexts), lane, mix_contexts)
        ends = np.concatenate([[0], np.cumsum(counts)])
        self.group_tokens: list[int] = ends[self.group_contexts].tolist()
        self.num_tokens = int(ends[-1])

    @property
    def num_groups(self) -> int:
        """Groups of contexts in this lane's epoch."""
        return len(self.group_tokens) - 1

    def group_of(self, token: int) -> int:
        """The group that holds a token of the lane; num_groups for the lane's end."""
        return bisect.bisect_right(self.group_tokens, token) - 1 if token < self.num_tokens else self.num_groups

    def contexts_of(self, group: int) -> NDArray[np.int64]:
        """The contexts of a group, as rows of TrainingData."""
        return self.contexts[self.group_contexts[group] : self.group_contexts[group + 1]]


class EpochPlan:
    """The order of one epoch over the given contexts."""

    def __init__(
        self,
        counts: NDArray[np.int64],
        contexts: NDArray[np.int64],
        order: StreamOrder,
        epoch: int,
        num_lanes: int | None = None,
    ) -> None:
        """`counts` int64 [C]: trainable tokens of every context; `contexts`: rows of it that this epoch reads.

        `num_lanes` where epochs differ in length and must have equally many; else what the contexts allow.
        """
        self.order, self.epoch = order, epoch
        self.num_lanes = effective_lanes(order.lanes, len(contexts)) if num_lanes is None else num_lanes
        self._counts = counts
        self._contexts = contexts
        self.num_tokens = int(counts[contexts].sum())
        full, rest = divmod(self.num_tokens, order.batch_size)
        self.num_batches = full + (1 if rest and not order.drop_last else 0)

    @cached_property
    def lanes(self) -> list[Lane]:
        """The permuted contexts dealt to the lanes like cards: the j-th goes to lane j mod lanes."""
        permuted = self._contexts[random_order(len(self._contexts), Purpose.CONTEXTS, self.order.seed, self.epoch)]
        hands = [permuted[lane :: self.num_lanes] for lane in range(self.num_lanes)]
        return [Lane(i, hand, self._counts[hand], self.order.mix_contexts) for i, hand in enumerate(hands)]

    @cached_property
    def apportionment(self) -> Apportionment:
        """How the lanes' tokens merge into one global order."""
        return Apportionment([lane.num_tokens for lane in self.lanes])

    def tokens_before(self, batch: int) -> int:
        """Trainable tokens of the batches before `batch`."""
        return min(batch * self.order.batch_size, self.num_tokens)

    def batches_for(self, tokens: int) -> int:
        """The fewest batches that hold `tokens` tokens."""
        return -(-tokens // self.order.batch_size)

    def offsets_at(self, batch: int) -> list[int]:
        """Tokens each lane has given before `batch`; at num_batches, all that the epoch gives."""
        return self.apportionment.counts_at(self.tokens_before(batch))

    def first_batch(self, lane: int, group: int) -> int:
        """The batch in which a group's first token is needed."""
        return self.apportionment.position_of(lane, self.lanes[lane].group_tokens[group]) // self.order.batch_size

    def token_order(self, lane: int, group: int) -> NDArray[np.int64]:
        """The permutation of a group's trainable tokens."""
        tokens = self.lanes[lane].group_tokens
        size = tokens[group + 1] - tokens[group]
        return random_order(size, Purpose.TOKENS, self.order.seed, self.epoch, lane, group)
