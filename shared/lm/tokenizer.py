"""The tokenizer of a model, its identity, and which of its tokens are not text."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shared.basics.errors import GranaryError, told_of
from shared.lm.identity import quiet_transformers, resolve_model

# Any of them holds a tokenizer: the tokenizers library's own form, SentencePiece, byte-level BPE, tiktoken.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """Token ids that are not text; a missing one is None."""

    bos: int | None
    eos: int | None
    pad: int
    """What fills the last context: the tokenizer's padding token, else EOS, else 0. Its positions are masked."""
    all: tuple[int, ...]
    """Every special token of the tokenizer, ascending: the named roles, and added tokens marked special, such as chat
    marks, fill in the middle, tools, reserved ones."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for a store's provenance."""
        return {**asdict(self), "all": list(self.all)}


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The fast tokenizer in the model folder `path` (see `resolve_model`).

    Raises GranaryError when the folder has none that the `tokenizers` library can run.
    """
    folder = resolve_model(path, revision)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise GranaryError(
            f"model {path} has no tokenizer: {folder} holds none of {', '.join(TOKENIZER_FILES)}; save it there with"
            " tokenizer.save_pretrained(folder)"
        )
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of several libraries, from files that may hold anything
            raise GranaryError(f"model {path} has no tokenizer that loads: {told_of(error)}") from error
    if not tokenizer.is_fast:
        raise GranaryError(f"model {path}: its tokenizer has no fast form (tokenizer.json): convert it first")
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """The special token ids of `tokenizer`."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    padding = next((token for token in (pad, eos) if token is not None), 0)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return SpecialIds(bos=bos, eos=eos, pad=padding, all=tuple(sorted(added | set(tokenizer.all_special_ids))))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides the ids of a text: the serialised tokenizer and how it treats special tokens."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(bool(tokenizer.split_special_tokens)).encode())
    return digest.hexdigest()
