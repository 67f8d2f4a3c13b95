"""The bytes that each token of a tokenizer stands for, without decoding anything: pages then need no tokenizer.

Three ways of spelling are known: byte-level BPE (GPT-2 and its heirs, Llama 3), where each character of a token is a
byte; SentencePiece (Llama 2, Gemma), where U+2581 is a space and <0x0A> a byte; and plain text with ## before the parts
of a word (BERT). The tokenizer's own description says which.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Bytes by token id; of a special token its name, of an id that no token has nothing."""
    kinds = set(_kinds(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]))
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    size = max(len(tokenizer), 1 + max(added, default=-1))
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    spelled = _byte_level if "ByteLevel" in kinds else _sentencepiece
    found = []
    for number, name in enumerate(names):
        if number in added:
            found.append(added[number].encode())
        else:
            found.append(b"" if name is None else spelled(name))
    return found


def _kinds(decoder: Any) -> Iterator[str]:
    """Names of a decoder and of those it is made of."""
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _kinds(part)


def _byte_level(name: str) -> bytes:
    return b"".join(bytes([_BYTES[letter]]) if letter in _BYTES else letter.encode() for letter in name)


def _sentencepiece(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.removeprefix("##").replace(_SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones are themselves, the others come from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_letters()
