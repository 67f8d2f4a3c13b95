"""How many batches a number of tokens or epochs is."""

from dataclasses import dataclass

from shared.basics.errors import GranaryError
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.epoch import Order, Plan, too_few_tokens

# A longer run is a slip of the pen: a day of epochs of a second each is 86,400 of them.
MOST_EPOCHS = 100_000


@dataclass(frozen=True, slots=True)
class StreamLength:
    """The length of a run."""

    steps: int
    """Batches."""
    tokens: int
    """Tokens in them."""
    end: tuple[int, int]
    """(epoch, batch) of the first batch that is not read any more."""


def stream_length(
    data: TrainingData, order: Order, *, tokens: int | None = None, epochs: float | None = None
) -> StreamLength:
    """The fewest whole batches that hold `tokens` tokens, or `epochs` passes over the data.

    Raises GranaryError unless exactly one of the two is given and positive, for more than data in blocks hold, and for
    more than `MOST_EPOCHS` passes.
    """
    if (tokens is None) == (epochs is None):
        raise GranaryError("give one of schedule.tokens and schedule.epochs, and set the other to null")
    asked = tokens if tokens is not None else epochs
    if asked is None or asked <= 0:
        raise GranaryError(f"schedule.{'epochs' if tokens is None else 'tokens'}={asked}: it must be above 0")
    if data.num_blocks is not None:
        if epochs is not None:
            tokens, epochs = round(epochs * data.num_tokens), None
        assert tokens is not None
        if tokens > data.num_tokens:
            raise GranaryError(
                f"the store has store.window and can be read once: {tokens:,} tokens are asked for, it has "
                f"{data.num_tokens:,}: lower schedule.tokens, or set schedule.epochs=1 and schedule.tokens=null"
            )
    steps = seen = epoch = 0
    plan: Plan | None = None
    while True:
        if data.num_blocks == epoch:  # drop_last left out a few
            return StreamLength(steps, seen, (epoch, 0))
        if plan is None or not (data.epochs_alike and order.batches_alike):
            plan = order.plan(data.counts, data.rows_of_epoch(order.seed, epoch), epoch)
        given = plan.tokens_before(plan.num_batches)
        if not plan.num_batches:
            raise too_few_tokens(plan)
        passes = epochs if tokens is None else tokens / given
        assert passes is not None
        if passes > MOST_EPOCHS:
            raise GranaryError(
                f"schedule.{'epochs' if tokens is None else 'tokens'}={asked:,} is {passes:,.0f} passes over the "
                f"store's {data.num_tokens:,} training tokens: lower it to {MOST_EPOCHS:,} passes at most"
            )
        if tokens is not None:
            wanted = min(tokens - seen, given)
        else:
            assert epochs is not None
            wanted = round(min(epochs - epoch, 1.0) * given)
        batches = plan.batches_for(wanted)
        steps += batches
        seen += plan.tokens_before(batches)
        last = batches < plan.num_batches
        if (tokens is not None and seen >= tokens) or (epochs is not None and epoch + 1 >= epochs):
            return StreamLength(steps, seen, (epoch, batches) if last else (epoch + 1, 0))
        epoch += 1
