"""Documents to token ids, in batches that the fast tokenizer spreads over its own threads."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from shared.errors import GranaryError
from stage_harvest.config import CorpusSchema
from stage_harvest.corpus import Chat, Corpus, Document, Mixture, Source, read_documents

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000

TokenIds = npt.NDArray[np.int32]


def token_documents(
    corpus: Corpus, cfg: CorpusSchema, seed: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[TokenIds]:
    """The token ids of each document of `corpus`, in the order that `cfg` and `seed` give; raises as `tokenise`."""
    if isinstance(corpus, Source):
        return tokenise(read_documents(corpus, cfg, seed), tokenizer, vocab_size)
    if not isinstance(corpus, Mixture):
        raise TypeError(f"{type(corpus).__name__} is neither a source nor a mixture")
    return corpus.mix(
        {
            name: tokenise(read_documents(part.source, part.cfg, seed), tokenizer, vocab_size)
            for name, part in corpus.parts.items()
        }
    )


def tokenise(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[TokenIds]:
    """The ids of each document, int32, without the special tokens that the tokenizer would add.

    Text gives the ids of ``tokenizer(text, add_special_tokens=False)``. Chats pass through the chat template and keep
    the special tokens it writes. Raises GranaryError for ids that the model, with `vocab_size` rows of embedding, does
    not have, and for a chat when the tokenizer has no template.
    """
    # The tokenizer's threads are wanted, and nothing forks after this.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    for batch in _batches(documents):
        for ids in _encode_batch(batch, tokenizer):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                bad = ids.max() if ids.max() >= vocab_size else ids.min()
                raise GranaryError(
                    f"token id {bad} is outside the model's vocabulary of {vocab_size}:"
                    " the corpus was tokenised for another model"
                )
            yield ids.astype(np.int32, copy=False)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_batch(batch: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[npt.NDArray[np.int64]]:
    """The ids of each document of `batch`, in order; texts and chats are encoded together, each kind at once."""
    encoded: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * len(batch)
    texts = [i for i, document in enumerate(batch) if isinstance(document, str)]
    chats = [i for i, document in enumerate(batch) if isinstance(document, Chat)]
    splits = bool(tokenizer.split_special_tokens)
    rendered = [_render(batch[i], tokenizer) for i in chats]
    for places, strings, as_text in ((texts, [str(batch[i]) for i in texts], splits), (chats, rendered, False)):
        for i, ids in zip(places, _encode(strings, tokenizer, as_text), strict=True):
            encoded[i] = ids
    for i, document in enumerate(batch):
        if isinstance(document, np.ndarray):
            encoded[i] = document.astype(np.int64)
    return encoded


def _encode(strings: list[str], tokenizer: PreTrainedTokenizerBase, as_text: bool) -> list[npt.NDArray[np.int64]]:
    """Token ids of `strings`; `as_text`: a special token spelt out in a text is text."""
    if not strings:
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = as_text
    # encode_batch_fast skips the character offsets, which nobody reads here.
    return [np.asarray(e.ids, np.int64) for e in backend.encode_batch_fast(strings, add_special_tokens=False)]


def _render(chat: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(chat, Chat):
        raise TypeError(f"{type(chat).__name__} is no chat")
    if tokenizer.chat_template is None:
        raise GranaryError("the corpus holds chat messages, but the model's tokenizer has no chat template")
    return str(tokenizer.apply_chat_template(chat.messages, tokenize=False))
