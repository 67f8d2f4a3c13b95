"""The order in which training reads a store, and the threads that keep ahead of it.

``data`` pins what may be read, ``permutation`` and ``apportion`` are pure functions that fix the order, ``epoch``
puts them together, ``pool`` holds contexts in memory and reads ahead, ``stream`` hands out batches.
"""

from stage_train.data.stream.data import StoreSlice, TrainingData
from stage_train.data.stream.epoch import EpochPlan, StreamOrder
from stage_train.data.stream.stream import Batch, BatchStream, TokenStream

__all__ = ["Batch", "BatchStream", "EpochPlan", "StoreSlice", "StreamOrder", "TokenStream", "TrainingData"]
