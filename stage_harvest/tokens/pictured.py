"""Rows with images to contexts, one row each: ids, what each place holds, and which region of which image.

The text has one placeholder per image; its token takes as many places as the image's layout has tokens.

Shapes: T positions of a context, L tokens of a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.basics.images import EncodedImage
from shared.lm import SpecialIds
from shared.lm.vision.layout import NO_CELL, Layout
from shared.lm.vision.reader import VisionReader, placeholder_encoder
from shared.store.format.image_table import ASSISTANT, IMAGE, PADDING, SPECIAL, STRUCTURE, TEXT, ImageRow
from stage_harvest.config import LongDocuments
from stage_harvest.corpus import Chat, Document, Pictured
from stage_harvest.tokens.assistant import Spans, replaced, tokens_in
from stage_harvest.tokens.packing import PADDING_SEGMENT, Packer
from stage_harvest.tokens.template import ChatRenderer
from stage_harvest.tokens.tokenise import check_unicode


class PicturedContext(NamedTuple):
    """One context of one row."""

    tokens_T: npt.NDArray[np.int32]
    mask_T: npt.NDArray[np.bool_]
    segments_T: npt.NDArray[np.int32]
    kind_T: npt.NDArray[np.uint8]
    image_T: npt.NDArray[np.int32]
    """Row of the table of images; -1 for none."""
    cell_T2: npt.NDArray[np.int16]
    rows: list[ImageRow]
    images: tuple[EncodedImage, ...]


@dataclass(slots=True)
class PicturedTokeniser:
    """Rows with images, text or chats, to the contexts of one model."""

    vision: VisionReader
    tokenizer: PreTrainedTokenizerBase
    chats: ChatRenderer
    packer: Packer
    special: SpecialIds
    assistant: bool
    """Whether to mark what the assistant said."""
    _encoder: Tokenizer = field(init=False)
    _contexts: int = field(default=0, init=False)
    _rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._encoder = placeholder_encoder(self.tokenizer)

    def contexts(self, documents: Iterable[Document]) -> Iterator[PicturedContext]:
        """One context per row, in order; rows of no tokens leave no trace.

        Raises GranaryError, naming file and row, for a broken image, a number of placeholders other than that of the
        images, and a row that is longer than a context and may not be cut or would be cut at an image.
        """
        for document in documents:
            if not isinstance(document.content, Pictured):
                raise TypeError(f"{document.where} is no row with images")
            context = self._context(document.content, document.where)
            if context is not None:
                self._contexts += 1
                self._rows += len(context.rows)
                yield context

    def _context(self, row: Pictured, where: str) -> PicturedContext | None:
        sizes = [image.decode().size for image in row.images]  # a broken one is found before any forward
        layouts = [
            self.vision.layout(*size, len(sizes), image.where) for size, image in zip(sizes, row.images, strict=True)
        ]
        ids, said = self._encoded(row.text, where)
        is_image = ids == self.vision.image_id
        if is_image.sum() != len(layouts):
            name = self.tokenizer.convert_ids_to_tokens(self.vision.placeholder_id)
            raise GranaryError(
                f"{where} has {len(layouts)} images, and its text {is_image.sum()} placeholders for them ({name})"
            )
        if not ids.size:
            return None
        counts = np.ones(len(ids), np.int64)
        counts[is_image] = [len(layout) for layout in layouts]
        image_L, cell_L2 = np.full(counts.sum(), -1, np.int32), np.full((counts.sum(), 2), NO_CELL, np.int16)
        first = self._rows
        for start, layout in zip((np.cumsum(counts) - counts)[is_image].tolist(), layouts, strict=True):
            image_L[start : start + len(layout)] = first + layout.grid_L
            cell_L2[start : start + len(layout)] = layout.cell_L2
            first += len(layout.grids)
        ids_L = np.repeat(ids, counts)
        kind_L = self._kinds(ids_L, np.repeat(said & ~is_image, counts), cell_L2)
        length = self._length(image_L, where)
        table = self._table(row, sizes, layouts)
        return self._padded(ids_L[:length], kind_L[:length], image_L[:length], cell_L2[:length], row, table)

    def _encoded(self, content: str | Chat, where: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids with one image token per image, and whether the assistant said them."""
        text, spans = content, Spans()
        if isinstance(content, Chat):
            text, spans = self.chats.render_spans(content, where) if self.assistant else (
                self.chats.render(content, where), Spans()
            )  # fmt: skip
            self.chats.used = True
        assert isinstance(text, str)
        check_unicode(text, where)
        placeholder = str(self.tokenizer.convert_ids_to_tokens(self.vision.placeholder_id))
        text, spans = replaced(text, spans, placeholder, self.vision.wrapped(self.tokenizer))
        encoding = self._encoder.encode(text, add_special_tokens=False)
        ids, said = np.array(encoding.ids, np.int32), tokens_in(spans, encoding.offsets)
        bos = self.packer.bos_id
        if bos is not None and ids.size and ids[0] != bos:
            ids, said = np.concatenate([[bos], ids]).astype(np.int32), np.concatenate([[False], said])
        return ids, said

    def _kinds(
        self, ids_L: npt.NDArray[np.int32], said_L: npt.NDArray[np.bool_], cell_L2: npt.NDArray[np.int16]
    ) -> npt.NDArray[np.uint8]:
        kind_L = np.where(np.isin(ids_L, self.special.all), SPECIAL, TEXT).astype(np.uint8)
        kind_L[np.isin(ids_L, (self.vision.image_id, *self.vision.structure_ids))] = STRUCTURE
        kind_L[cell_L2[:, 0] != NO_CELL] = IMAGE
        kind_L[said_L & np.isin(kind_L, (TEXT, SPECIAL))] |= ASSISTANT
        return kind_L

    def _length(self, image_L: npt.NDArray[np.int32], where: str) -> int:
        """Tokens of a row that are kept."""
        total, room = len(image_L), self.packer.seq_len
        if total <= room:
            return total
        needed = int(np.flatnonzero(image_L >= 0).max(initial=-1)) + 1
        if needed > room:
            raise GranaryError(
                f"{where} takes {total:,} tokens, and an image is not cut: set packing.seq_len={needed} or more, or"
                " leave the row out"
            )
        if self.packer.long_documents is not LongDocuments.truncate:
            raise GranaryError(
                f"{where} takes {total:,} tokens, and rows with images are not split: set packing.seq_len={total} or"
                " more, or packing.long_documents=truncate"
            )
        return room

    def _padded(
        self,
        ids_L: npt.NDArray[np.int32],
        kind_L: npt.NDArray[np.uint8],
        image_L: npt.NDArray[np.int32],
        cell_L2: npt.NDArray[np.int16],
        row: Pictured,
        table: list[ImageRow],
    ) -> PicturedContext:
        T, L = self.packer.seq_len, len(ids_L)
        tokens_T = np.full(T, self.special.pad, np.int32)
        segments_T = np.full(T, PADDING_SEGMENT, np.int32)
        kind_T = np.full(T, PADDING, np.uint8)
        image_T, cell_T2 = np.full(T, -1, np.int32), np.full((T, 2), NO_CELL, np.int16)
        tokens_T[:L], segments_T[:L], kind_T[:L], image_T[:L], cell_T2[:L] = ids_L, 0, kind_L, image_L, cell_L2
        mask_T = segments_T != PADDING_SEGMENT
        mask_T[: self.packer.mask_first] = False
        if self.packer.mask_special:
            mask_T &= ~np.isin(kind_T & ~np.uint8(ASSISTANT), (SPECIAL, STRUCTURE))
        return PicturedContext(tokens_T, mask_T, segments_T, kind_T, image_T, cell_T2, table, row.images)

    def _table(self, row: Pictured, sizes: list[tuple[int, int]], layouts: list[Layout]) -> list[ImageRow]:
        found: list[ImageRow] = []
        for number, (image, (width, height), layout) in enumerate(zip(row.images, sizes, layouts, strict=True)):
            for place, grid in enumerate(layout.grids):
                found.append(
                    ImageRow(
                        id=self._rows + len(found), context=self._contexts, number=number, grid=place,
                        sha256=image.sha256, row=row.row, path=image.path, width=width, height=height,
                        rows=grid.rows, cols=grid.cols, x=grid.x, y=grid.y, dx=grid.dx, dy=grid.dy,
                    )
                )  # fmt: skip
        return found
