"""Documents to token ids, in batches."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from stage_harvest.config import CorpusSchema
from stage_harvest.corpus import Chat, Corpus, Document, Mixture, Source, read_documents
from stage_harvest.tokens.encoder import TextEncoder, Texts

BATCH_DOCUMENTS = 1024
# Characters in the first batch and the most in any: each is twice the last, so that a harvest of few contexts does not
# tokenise what it will not use.
FIRST_CHARACTERS, BATCH_CHARACTERS = 50_000, 1_000_000

TokenIds = npt.NDArray[np.int32]


def token_documents(
    corpus: Corpus,
    cfg: CorpusSchema,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    encoder: TextEncoder | None = None,
) -> Iterator[TokenIds]:
    """The token ids of each document of `corpus`, in the order that `cfg` and `seed` give; raises as `tokenise`."""
    if isinstance(corpus, Source):
        return tokenise(read_documents(corpus, cfg, seed), tokenizer, vocab_size, encoder)
    if not isinstance(corpus, Mixture):
        raise TypeError(f"{type(corpus).__name__} is neither a source nor a mixture")
    return corpus.mix(
        {
            name: tokenise(read_documents(part.source, part.cfg, seed), tokenizer, vocab_size, encoder)
            for name, part in corpus.parts.items()
        }
    )


def tokenise(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    encoder: TextEncoder | None = None,
) -> Iterator[TokenIds]:
    """The ids of each document, int32, without the special tokens that the tokenizer would add.

    Text gives the ids of ``tokenizer(text, add_special_tokens=False)``. Chats pass through the chat template and keep
    the special tokens it writes. `encoder` (of this tokenizer) may have workers; without one the text is encoded here.
    Raises GranaryError for ids that the model, with `vocab_size` rows of embedding, does not have, and for a chat when
    the tokenizer has no template.
    """
    encoder = encoder or TextEncoder(tokenizer.backend_tokenizer.to_str())
    batches: deque[list[Document]] = deque()  # those given to the encoder and not come back yet
    encoded = encoder.encode(_texts(_remembered(_batches(documents), batches), tokenizer))
    # Each batch makes two sets of texts, either of which may be empty: plain ones, and rendered chats.
    for texts, chats in zip(encoded, encoded, strict=True):
        plain, rendered = iter(texts), iter(chats)
        for document in batches.popleft():
            match document:
                case str():
                    ids = next(plain)
                case Chat():
                    ids = next(rendered)
                case _:
                    ids = document.astype(np.int64)  # uint32 ids beyond int32 must not wrap around
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                bad = ids.max() if ids.max() >= vocab_size else ids.min()
                raise GranaryError(
                    f"token id {bad} is outside the model's vocabulary of {vocab_size}:"
                    " the corpus was tokenised for another model"
                )
            yield ids.astype(np.int32, copy=False)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters, wanted = 0, FIRST_CHARACTERS
    for document in documents:
        batch.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= wanted:
            yield batch
            batch, characters, wanted = [], 0, min(2 * wanted, BATCH_CHARACTERS)
    if batch:
        yield batch


def _remembered(batches: Iterable[list[Document]], memory: deque[list[Document]]) -> Iterator[list[Document]]:
    for batch in batches:
        memory.append(batch)
        yield batch


def _texts(batches: Iterable[list[Document]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Texts]:
    """Two per batch: its texts, and its chats as the template writes them."""
    for batch in batches:
        splits = bool(tokenizer.split_special_tokens)
        yield Texts([document for document in batch if isinstance(document, str)], splits)
        yield Texts([_render(document, tokenizer) for document in batch if isinstance(document, Chat)], False)


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise GranaryError("the corpus holds chat messages, but the model's tokenizer has no chat template")
    return str(tokenizer.apply_chat_template(chat.messages, tokenize=False))
