"""Example records: where a latent fired most in a window, and what the tokens around that place were worth to it.

W tokens of a window. A window is a block of W positions from the start of a document's part in a context, so none
crosses a document. A record's text reaches from `before` tokens before its peak to `after` tokens behind it, within the
document's part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.arrays import ArrayReader
from shared.latents.layout import NONE
from shared.latents.vocabulary import Piece, Vocabulary

DECILES = 10


@dataclass(frozen=True, slots=True)
class Example:
    """A piece of the store's text with one latent's activation of every token."""

    tokens: npt.NDArray[np.int32]
    """Ids [n], as the store has them."""
    values: npt.NDArray[np.float32]
    """Activations [n]; 0 where the latent is silent, or the position is masked out."""
    peak: int
    """Which of the n tokens the record is of."""
    value: float
    """Activation there, exact; the others have 11 bits."""
    context: int
    """Context in the store."""
    position: int
    """Position of the peak within the context."""
    document: int
    """Document's number within the context."""
    start: int
    """Position of the first of the n tokens within the context."""
    vocabulary: Vocabulary | None = None
    kind: npt.NDArray[np.uint8] | None = None
    """What each of the n tokens is (`shared.store.format.image_table`); None in a folder of a store of text."""
    image: npt.NDArray[np.int32] | None = None
    """Row of the store's table of images that a region is in, -1 for none."""
    cell: npt.NDArray[np.int16] | None = None
    """Row and column of a region in its grid [n, 2], -1 for none."""

    @property
    def text(self) -> str:
        """The tokens as text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def pieces(self) -> list[Piece]:
        """The tokens as pieces of text; empty where the folder has no vocabulary."""
        return [] if self.vocabulary is None else self.vocabulary.pieces(self.tokens)

    @property
    def strings(self) -> list[str]:
        """One string per token, empty where a character of the one before goes on; ids where there is no vocabulary."""
        if self.vocabulary is None:
            return [f"<token {token}> " for token in self.tokens]
        found = [""] * len(self.tokens)
        for piece in self.pieces:
            found[piece.start] = piece.text
        return found

    @property
    def marked(self) -> str:
        """The text with the pieces above a third of the peak in ``<<`` and ``>>``; runs of them share one pair."""
        found, is_open = "", False
        for piece in self.pieces:
            is_hot = bool(self.values[piece.start : piece.stop].max() > 0.3 * self.value)
            if is_hot != is_open:
                found += "<<" if is_hot else ">>"
                is_open = is_hot
            found += piece.text
        return found + (">>" if is_open else "")


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one latent as they lie in the arrays, in their order."""

    window: npt.NDArray[np.uint32]
    """Rows of the windows of the peaks [n]."""
    position: npt.NDArray[np.uint16]
    """Position of each peak within its window."""
    value: npt.NDArray[np.float32]
    active: npt.NDArray[np.uint8]
    """Active positions beside each peak."""
    offset: npt.NDArray[np.int8]
    """Of each active position from its peak [sum of active]."""
    share: npt.NDArray[np.float16]
    """Its activation divided by the peak's."""

    def take(self, chosen: Sequence[int] | npt.NDArray[np.integer]) -> "Records":
        """These of the records, in the order given."""
        rows = np.asarray(chosen, np.int64)
        ends = np.cumsum(self.active, dtype=np.int64)
        spans = [np.arange(ends[row] - self.active[row], ends[row]) for row in rows]
        places = np.concatenate([np.empty(0, np.int64), *spans])
        return Records(
            self.window[rows],
            self.position[rows],
            self.value[rows],
            self.active[rows],
            self.offset[places],
            self.share[places],
        )

    def __len__(self) -> int:
        return len(self.window)


class WindowTable:
    """The windows' tokens and places."""

    def __init__(
        self,
        start: ArrayReader,
        segment: ArrayReader,
        tokens: ArrayReader,
        seq_len: int,
        before: int,
        after: int,
        held: Mapping[str, ArrayReader],
    ) -> None:
        """`held`: arrays beside the tokens, whose rows become fields of an example."""
        self.starts, self.segments, self._tokens = start, segment, tokens
        self.seq_len, self.before, self.after, self._held = seq_len, before, after, held
        self.width = tokens.row_shape[0]

    def examples(
        self, records: Records, vocabulary: Vocabulary | None, *, within_window: bool = False
    ) -> list[Example]:
        """The records with their text, which ends where the window does if it is to stay `within_window`."""
        back, ahead = -(-self.before // self.width), -(-self.after // self.width)
        reach = np.arange(-back, ahead + 1)
        rows = records.window.astype(np.int64)[:, None] + reach
        is_there = (rows >= 0) & (rows < self.starts.num_rows)
        needed = np.unique(rows[is_there])
        place = {int(row): number for number, row in enumerate(needed)}
        starts, segments = self.starts.take(needed), self.segments.take(needed)
        tokens = self._tokens.take(needed)
        held = {name: reader.take(needed) for name, reader in self._held.items()}
        ends = np.cumsum(records.active, dtype=np.int64)
        found = []
        for number in range(len(records)):
            own = int(records.window[number])
            window = place[own]
            first, context = int(starts[window]), int(starts[window]) // self.seq_len
            parts, begin = list[int](), first
            for row in rows[number]:
                other = place.get(int(row))
                if other is None or int(starts[other]) != first + (int(row) - own) * self.width:
                    continue
                if int(starts[other]) // self.seq_len != context or segments[other] != segments[window]:
                    continue
                parts.append(other)
                begin = min(begin, int(starts[other]))
            run = tokens[parts].reshape(-1)
            run = run[: int(np.argmax(run == NONE))] if (run == NONE).any() else run
            peak = first + int(records.position[number])
            low, high = max(begin, peak - self.before), min(begin + len(run), peak + self.after + 1)
            if within_window:
                low, high = first, min(begin + len(run), first + self.width)
            values = np.zeros(high - low, np.float32)
            span = slice(int(ends[number]) - int(records.active[number]), int(ends[number]))
            at = peak - low + records.offset[span].astype(np.int64)
            inside = (at >= 0) & (at < len(values))
            values[at[inside]] = records.share[span][inside].astype(np.float32) * records.value[number]
            values[peak - low] = records.value[number]
            found.append(
                Example(
                    tokens=run[low - begin : high - begin].astype(np.int32),
                    values=values,
                    peak=peak - low,
                    value=float(records.value[number]),
                    context=context,
                    position=peak % self.seq_len,
                    document=int(segments[window]),
                    start=low % self.seq_len,
                    vocabulary=vocabulary,
                    **{name: np.concatenate(rows[parts])[low - begin : high - begin] for name, rows in held.items()},
                )
            )
        return found


def decile(count: int, quantile: int) -> slice:
    """Where the quantile-th tenth of `count` records sorted by falling value lies; 0 is the strongest."""
    return slice(count * quantile // DECILES, count * (quantile + 1) // DECILES)
