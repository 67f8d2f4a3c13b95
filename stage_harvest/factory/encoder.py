"""Text through an encoder: a document alone in each forward, with the special tokens that its tokenizer puts around it.

An encoder looks both ways, so documents can't share a row of a batch; run alone, a document needs no padding either.

Legend: L tokens of a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.lm import (
    SpecialIds,
    load_tokenizer,
    model_identity,
    special_ids,
    tokenizer_hash,
)
from shared.lm.calls import Masked
from shared.lm.encoders import ids_around, most_positions
from shared.lm.identity import read_config
from stage_harvest.config import BosPlacement, HarvestSchema, LongDocuments, PackingMode, PackingSchema, StoreCorpus
from stage_harvest.corpus import open_corpus
from stage_harvest.factory.made import KnownModel, encoder_of
from stage_harvest.job import parse_date
from stage_harvest.tokens.encoder import TextEncoder
from stage_harvest.tokens.template import ChatRenderer
from stage_harvest.tokens.tokenise import Tokeniser


@dataclass(frozen=True)
class EncoderText(KnownModel):
    """An encoder and the documents of a corpus."""

    packages = ("torch", "transformers", "tokenizers", "numpy")
    tokenizer: PreTrainedTokenizerBase
    special: SpecialIds
    around: tuple[list[int], list[int]]
    packing: PackingSchema

    def tokens_of(self, batch: Any) -> Tensor | None:
        ids: Tensor = batch.inputs["input_ids"]
        return ids

    def record(self) -> dict[str, Any]:
        return {
            "model": self.identity(),
            "tokenizer": {"hash": tokenizer_hash(self.tokenizer), "special_ids": self.special.to_dict()},
            "packing": {
                "mode": "isolated",
                "long_documents": self.packing.long_documents.value,
                "mask_special": self.packing.mask_special,
                "around": [*self.around],
            },
        }


def encoder_of_text(cfg: HarvestSchema, device: torch.device) -> EncoderText:
    """The encoder, whole, and the documents as its batches. Raises GranaryError for what can't be had or made so."""
    path, revision, packing = cfg.model.path, cfg.model.revision, cfg.packing
    config = read_config(path, revision)
    check(cfg, config.model_type)
    tokenizer = load_tokenizer(path, revision)
    around = ids_around(tokenizer) if packing.bos is not BosPlacement.none else ([], [])
    limit, positions = packing.seq_len, most_positions(config, tokenizer)
    room = min(limit, positions or limit) - len(around[0]) - len(around[1])
    if room < 1:
        raise GranaryError(f"packing.seq_len={limit}: no token has room beside the special ones of {path}")
    source, special = open_corpus(cfg.corpus), special_ids(tokenizer)
    chats = ChatRenderer(tokenizer, parse_date(cfg.chat.date), cfg.chat.variables)

    def batches(seed: int) -> Iterator[Masked]:
        with TextEncoder(tokenizer.backend_tokenizer.to_str()) as encoder:
            tokeniser = Tokeniser(config.vocab_size, tokenizer, chats, encoder)
            for ids_L in tokeniser.corpus_ids(source, cfg.corpus, seed):
                for piece in pieces(ids_L, room, split=packing.long_documents is LongDocuments.split):
                    yield as_batch(piece, around, special if packing.mask_special else None)

    model = encoder_of(cfg, device)
    known = model_identity(path, revision, cfg.model.dtype.value)
    return EncoderText(path, model, batches, config.model_type, known, source, tokenizer, special, around, packing)


def check(cfg: HarvestSchema, kind: str) -> None:
    """Raise GranaryError for settings that an encoder has not."""
    told = f"model {cfg.model.path} is an encoder ({kind})"
    if isinstance(cfg.corpus, StoreCorpus):
        raise GranaryError(f"{told}, for which corpus=store is not taken: give the texts")
    if cfg.packing.mode is PackingMode.joined:
        raise GranaryError(f"{told}, which sees a row whole: documents can't be joined, leave packing out")
    if cfg.packing.mask_first or cfg.packing.drop_last:
        raise GranaryError(f"{told}, whose documents are run alone: packing.mask_first and drop_last are for decoders")
    if cfg.model.quantisation is not None:
        raise GranaryError(f"{told}: model.quantisation is for decoders, leave it out")


def pieces(ids_L: npt.NDArray[np.int32], room: int, *, split: bool) -> Iterator[npt.NDArray[np.int32]]:
    """The parts of a document that are run one by one; without `split` the first alone."""
    stops = range(0, len(ids_L), room) if split else range(0, min(len(ids_L), 1))
    return (ids_L[start : start + room] for start in stops)


def as_batch(ids_L: npt.NDArray[np.int32], around: tuple[list[int], list[int]], special: SpecialIds | None) -> Masked:
    """A document between its special tokens, which count where `special` is None."""
    ids_1L = torch.tensor([[*around[0], *ids_L.tolist(), *around[1]]])
    hidden = torch.tensor([] if special is None else special.all, dtype=torch.int64)
    return Masked({"input_ids": ids_1L}, ~torch.isin(ids_1L, hidden))
