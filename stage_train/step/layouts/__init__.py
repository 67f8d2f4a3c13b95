"""How a dictionary in training is spread over processes: one class per layout, all with the methods of Layout.

A layout says which rows of a batch a rank reads, which part of the weights it holds, and how gradients meet. The
trainer is the same under all of them, and so are the weights it arrives at.
"""

from stage_train.step.layouts.base import Layout
from stage_train.step.layouts.make import make_layout

__all__ = ["Layout", "make_layout"]
