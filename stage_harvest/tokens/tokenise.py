"""Documents to token ids, in batches: group, encode, take apart again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from stage_harvest.config import CorpusSchema
from stage_harvest.corpus import Chat, Corpus, CorpusSource, Document, Mixture, Pictured, read_documents
from stage_harvest.tokens.encoder import TextEncoder, Texts
from stage_harvest.tokens.template import ChatRenderer

BATCH_DOCUMENTS = 1024
# Characters in the first batch and the most in any: each is twice the last, so that a harvest of few contexts does not
# tokenise what it will not use.
FIRST_CHARACTERS, BATCH_CHARACTERS = 50_000, 1_000_000

TokenIds = npt.NDArray[np.int32]


@dataclass(slots=True)
class Tokeniser:
    """Text, chats and ready ids to the ids of one model."""

    vocab_size: int
    """Rows of the model's embedding."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where the model has none: then the corpus must hold token ids."""
    chats: ChatRenderer | None
    encoder: TextEncoder
    no_tokenizer: str = "the model has no tokenizer"
    """Why there is none, as a sentence."""

    def corpus_ids(self, corpus: Corpus, cfg: CorpusSchema, seed: int) -> Iterator[TokenIds]:
        """The token ids of each document of `corpus`, in the order that `cfg` and `seed` give; raises as `ids`."""
        if isinstance(corpus, CorpusSource):
            return self.ids(read_documents(corpus, cfg, seed))
        if not isinstance(corpus, Mixture):
            raise TypeError(f"{type(corpus).__name__} is neither a source nor a mixture")
        streams = {name: self.ids(read_documents(part.source, part.cfg, seed)) for name, part in corpus.parts.items()}
        return corpus.mix(streams)

    def ids(self, documents: Iterable[Document]) -> Iterator[TokenIds]:
        """The ids of each document, int32, without the special tokens that the tokenizer would add.

        Text gives the ids of ``tokenizer(text, add_special_tokens=False)``. Chats pass through the chat template and
        keep the special tokens it writes. Raises GranaryError, naming file and line or row, for ids that the model does
        not have, text that is no Unicode, text without a tokenizer, and chats that the template can't take.
        """
        grouped = ((batch, self._texts(batch)) for batch in _batches(documents))
        for batch, (texts, rendered) in self.encoder.encode(grouped):
            encoded, encoded_chats = iter(texts), iter(rendered)
            for document in batch:
                match document.content:
                    case str():
                        ids = next(encoded)
                    case Chat():
                        ids = next(encoded_chats)
                        assert self.chats is not None
                        self.chats.used = True
                    case Pictured():
                        raise TypeError(f"{document.where}: rows with images are for PicturedTokeniser")
                    case array:
                        ids = array.astype(np.int64)  # uint32 ids beyond int32 must not wrap around
                if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                    bad = ids.max() if ids.max() >= self.vocab_size else ids.min()
                    raise GranaryError(
                        f"{document.where}: token id {bad} is outside the model's vocabulary of {self.vocab_size}:"
                        " the corpus was tokenised for another model"
                    )
                yield ids.astype(np.int32, copy=False)

    def _texts(self, batch: list[Document]) -> list[Texts]:
        """The texts of a batch, and its chats as the template writes them."""
        plain = [(d.content, d.where) for d in batch if isinstance(d.content, str)]
        chats = [(d.content, d.where) for d in batch if isinstance(d.content, Chat)]
        if self.tokenizer is None or self.chats is None:
            for _, where in [*plain, *chats]:
                raise GranaryError(f"{where} holds text, and {self.no_tokenizer}")
            return [Texts([], True), Texts([], True)]
        rendered = [(self.chats.render(chat, where), where) for chat, where in chats]
        for text, where in [*plain, *rendered]:
            check_unicode(text, where)
        splits = bool(self.tokenizer.split_special_tokens)
        return [Texts([text for text, _ in plain], splits), Texts([text for text, _ in rendered], False)]


def check_unicode(text: str, where: str) -> None:
    """Raise GranaryError naming `where` for text that is no Unicode."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = repr(text[max(error.start - 20, 0) : error.end])
        raise GranaryError(
            f"{where} holds half of a surrogate pair, which is no text, at character {error.start}: {near}"
        ) from error


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters, wanted = 0, FIRST_CHARACTERS
    for document in documents:
        batch.append(document)
        characters += len(document.content) if isinstance(document.content, str) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= wanted:
            yield batch
            batch, characters, wanted = [], 0, min(2 * wanted, BATCH_CHARACTERS)
    if batch:
        yield batch
