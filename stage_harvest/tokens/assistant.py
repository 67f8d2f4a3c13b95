"""Which characters of a rendered chat the assistant said, and which tokens these are.

transformers compares the offsets of the text before images are put in with those of the text behind, so that its own
mask is empty or shifted wherever there is an image. Here the spans belong to the text that is tokenised, and images
take more places only when ids and mask stand side by side.

Shapes: L tokens.
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Spans = list[tuple[int, int]]
"""[start, end) of characters."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_tags(template: str) -> bool:
    """Whether a chat template says what the assistant writes."""
    return GENERATION.search(template) is not None


def replaced(text: str, spans: Spans, old: str, new: str) -> tuple[str, Spans]:
    """`text` with every `old` replaced by `new`, and the spans of the characters that stay; `new` is in none."""
    pieces = text.split(old)
    start, begins, found = 0, 0, Spans()  # of the piece, in the old and in the new text
    for piece in pieces:
        cut = ((max(first, start), min(end, start + len(piece))) for first, end in spans)
        found += [(first - start + begins, end - start + begins) for first, end in cut if first < end]
        start, begins = start + len(piece) + len(old), begins + len(piece) + len(new)
    return new.join(pieces), found


def tokens_in(spans: Spans, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Whether each token, of characters [start, end), has one of a span; bool [L]."""
    said = np.zeros(len(offsets), bool)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    for start, end in spans:
        said |= np.where(starts == ends, (start < starts) & (starts <= end), (starts < end) & (ends > start))
    return said
