"""Token ids to text by a table of bytes: no tokenizer is needed, and nothing is ever tokenised again.

A character may be made of several tokens (byte-level BPE, byte fallback), and a window may begin in the middle of one.
So the bytes of a run of tokens are joined, and tokens that share a character are shown together.
"""

import codecs
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of tokens [start, stop) of a run, which share a character where they are more than one."""

    text: str
    start: int
    stop: int
    is_special: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token."""

    offsets: npt.NDArray[np.uint32]
    """[V + 1]: token i is bytes offsets[i] to offsets[i + 1]."""
    data: npt.NDArray[np.uint8]
    special: npt.NDArray[np.bool_]
    """[V]: the token is no text, whatever its bytes; they are its name, such as ``<s>``."""

    @classmethod
    def of(cls, tokens: Sequence[bytes], special: Sequence[int] = ()) -> "Vocabulary":
        """The table of these tokens, in the order of their ids."""
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.uint32)
        is_special = np.zeros(len(tokens), bool)
        is_special[[one for one in special if one < len(tokens)]] = True
        return cls(offsets, np.frombuffer(b"".join(tokens), np.uint8), is_special)

    def __len__(self) -> int:
        return len(self.special)

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; none for an id that the vocabulary lacks."""
        if not 0 <= token < len(self):
            return b""
        return self.data[int(self.offsets[token]) : int(self.offsets[token + 1])].tobytes()

    def text_of(self, token: int) -> str:
        """One token alone, for a list: bytes that are no whole character as ``<0xE2>``."""
        if not 0 <= token < len(self):
            return f"<token {token}>"
        return self.bytes_of(token).decode("utf-8", errors="granary-bytes")

    def pieces(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> list[Piece]:
        """A run of tokens as text; every token is in exactly one piece, and no piece's text is cut in a character."""
        found: list[Piece] = []
        pending, start = b"", 0
        whole = self._whole
        for number, token in enumerate(np.asarray(tokens).tolist()):
            text = whole.get(token) if not pending else None
            if text is not None:
                found.append(Piece(text, number, number + 1))
                start = number + 1
                continue
            if not 0 <= token < len(self) or self.special[token]:
                if pending:
                    found.append(Piece(_text(pending), start, number))
                found.append(Piece(self.text_of(token), number, number + 1, is_special=True))
                pending, start = b"", number + 1
                continue
            pending += self.bytes_of(token)
            if not _ends_inside(pending):
                found.append(Piece(_text(pending), start, number + 1))
                pending, start = b"", number + 1
        if start < len(tokens):
            found.append(Piece(_text(pending), start, len(tokens)))
        return found

    def text(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """A run of tokens as one text, special tokens by their names."""
        return "".join(piece.text for piece in self.pieces(tokens))

    def find(self, text: str) -> list[int]:
        """Ids of the tokens that are this text, with or without one space before it."""
        wanted = {text.encode(), b" " + text.encode()}
        lengths = np.diff(self.offsets.astype(np.int64))
        candidates = np.flatnonzero(np.isin(lengths, [len(one) for one in wanted]))
        return [int(token) for token in candidates if self.bytes_of(int(token)) in wanted]

    @cached_property
    def texts(self) -> list[str]:
        """`text_of` every token."""
        return [self.text_of(token) for token in range(len(self))]

    @cached_property
    def _whole(self) -> dict[int, str]:
        """Texts of the tokens that are whole characters, by id: all that most texts are made of."""
        found = {}
        for token in np.flatnonzero(~self.special).tolist():
            with suppress(UnicodeDecodeError):
                found[token] = self.bytes_of(token).decode()
        return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="granary-bytes")


def _ends_inside(data: bytes) -> bool:
    """Whether the last character lacks bytes that may still come."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return length > back
        if byte < 0x80:
            return False
    return False


def _bytes_as_names(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no text as people of the field write them: ``<0xE2>``."""
    assert isinstance(error, UnicodeDecodeError)
    wrong = error.object[error.start : error.end]
    return "".join(f"<0x{byte:02X}>" for byte in wrong), error.end


codecs.register_error("granary-bytes", _bytes_as_names)
