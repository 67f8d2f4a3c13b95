"""The order in which training reads a store, and the threads that keep ahead of it.

``data`` pins what may be read, ``permutation`` and ``apportion`` are pure functions that fix the order, ``epoch``
puts them together, ``pool`` holds contexts in memory and reads ahead, ``stream`` hands out batches of shuffled tokens
and ``contexts`` batches of whole contexts, both as ``base`` says.
"""

from stage_train.data.stream.batch import AnyBatch, Batch, BatchStream, ContextBatch
from stage_train.data.stream.contexts import ContextOrder, ContextStream
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.epoch import EpochPlan, Order, StreamOrder
from stage_train.data.stream.slices import StoreSlice
from stage_train.data.stream.stream import TokenStream

__all__ = [
    "AnyBatch",
    "Batch",
    "BatchStream",
    "ContextBatch",
    "ContextOrder",
    "ContextStream",
    "EpochPlan",
    "Order",
    "StoreSlice",
    "StreamOrder",
    "TokenStream",
    "TrainingData",
]
