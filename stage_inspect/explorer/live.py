"""The language model and the dictionary on the spot: which latents fire on a text, and what one of them does.

Both are loaded when they are first asked for. One question is answered at a time.

Legend: T tokens of the text, K slots of a token, F latents.
"""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.intervene.edits import MODES, Edit
from shared.intervene.splice import SplicedModel
from shared.latents import Latents
from shared.lm import capture, load_causal_lm, load_tokenizer, model_identity, tokenizer_hash
from shared.lm.modulepoint import ModulePoint
from shared.lm.targets import point_of
from shared.sae.for_store import check_whole, weights_sha256
from shared.sae.loading import load
from shared.sae.sites import side_by_side
from shared.sae.variants import Dictionary
from shared.store.same_model import check_same_model
from stage_inspect.explorer.explained import short
from stage_inspect.explorer.limits import GENERATED_TOKENS, TEXT_CHARACTERS, TEXT_TOKENS

NEXT_TOKENS = 8


@dataclass(frozen=True)
class LiveSettings:
    """Where the two are; None: where the latents folder says."""

    dictionary: Path
    model: str
    revision: str | None
    dtype: str
    flag: str = "--model"
    """That of the command line which names the model."""

    @classmethod
    def find(
        cls, latents: Latents, model: str | None, dictionary: Path | None, flag: str = "--model"
    ) -> "LiveSettings":
        """Take them from the command line, else from the folder's records. Raises GranaryError for what is not here."""
        recorded, was_at = latents.meta.model, Path(str(latents.meta.dictionary.get("path", "")))
        # A run folder that was moved, or is looked at from elsewhere, has it beside the latents.
        places = [dictionary] if dictionary else [was_at, Path(latents.url).parent / was_at.name]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise GranaryError(f"the dictionary was at {places[0]}, which is not here: give --dictionary FOLDER")
        revision = None if model else recorded.get("revision")
        is_named = revision or recorded.get("id") == "bundled"  # not a folder that lay somewhere
        path = model or (recorded.get("id") if is_named else recorded.get("path"))
        if path is None:
            raise GranaryError(f"the latents folder does not record its model: give {flag} PATH")
        return cls(folder, str(path), revision, str(recorded.get("dtype", "float32")), flag)


class Live:
    """Answers about texts that nobody has harvested."""

    def __init__(self, latents: Latents, settings: LiveSettings) -> None:
        self.latents, self.settings = latents, settings
        self._lock = threading.Lock()

    @cached_property
    def dictionary(self) -> Dictionary:
        """Raises GranaryError where it is another one than the folder's."""
        folder = self.settings.dictionary
        check_whole(str(folder), folder)
        if weights_sha256(folder) != self.latents.meta.dictionary["sha256"]:
            raise GranaryError(f"{folder} is not the dictionary that {self.latents.url} was made of: inspect it anew")
        return load(folder).eval()

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The sites that the dictionary encodes."""
        return tuple(self.latents.meta.dictionary["reads"])

    @cached_property
    def model(self) -> PreTrainedModel:
        """Raises GranaryError where it is another one than was harvested."""
        asked = self.settings
        recorded = self.latents.meta.model
        identity = model_identity(asked.model, asked.revision, asked.dtype)
        check_same_model(asked.model, {**identity}, "the latents folder", recorded)
        return load_causal_lm(asked.model, asked.dtype, revision=asked.revision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises GranaryError where it gives other ids than were harvested."""
        loaded = load_tokenizer(self.settings.model, self.settings.revision)
        recorded = self.latents.meta.tokenizer.get("hash")
        if recorded is not None and recorded != tokenizer_hash(loaded):
            asked = self.settings
            raise GranaryError(f"the tokenizer of {asked.model} is not that of the harvest: give {asked.flag} PATH")
        return loaded

    @property
    def can_steer(self) -> bool:
        """Whether the dictionary can be spliced into the model: all of its sites are places of this one."""
        made_of = self.latents.meta.dictionary
        return all(ModulePoint.of_site(site) is not None for site in (*made_of["reads"], *made_of["writes"]))

    def read(self, text: str) -> dict[str, Any]:
        """The tokens of `text` in pieces, and every latent that fires with its values. Raises GranaryError."""
        with self._lock:
            ids, is_cut = self._encode(text)
            values_TK, indices_TK = self._latents(ids)
        token_P, slot_P = np.nonzero(indices_TK >= 0)
        latent_P, value_P = indices_TK[token_P, slot_P], values_TK[token_P, slot_P]
        order = np.lexsort((token_P, latent_P))
        token_P, latent_P, value_P = token_P[order], latent_P[order], value_P[order]
        found = []
        for start, stop in spans(latent_P):
            values = value_P[start:stop]
            found.append(
                {
                    "latent": int(latent_P[start]),
                    "max": short(values.max()),
                    "sum": short(values.sum()),
                    "at": token_P[start:stop].tolist(),
                    "a": [short(value) for value in values],
                    "peak": int(token_P[start + int(values.argmax())]),
                }
            )
        return {**self._pieces(ids), "latents": found, "cut": is_cut}

    def steer(self, prompt: str, latent: int, mode: str, strength: float, tokens: int) -> dict[str, Any]:
        """The model's greedy continuation of `prompt` with one latent edited, and without. Raises GranaryError."""
        if mode not in MODES:
            raise GranaryError(f"there is no edit {mode!r}: choose from {', '.join(MODES)}")
        if not 1 <= tokens <= GENERATED_TOKENS:
            raise GranaryError(f"the model writes 1 to {GENERATED_TOKENS} tokens at a time")
        if not np.isfinite(strength):
            raise GranaryError("the strength must be a finite number")
        with self._lock:
            ids, is_cut = self._encode(prompt)
            if is_cut:
                raise GranaryError(f"the prompt has more than {TEXT_TOKENS} tokens")
            edit = Edit([latent], mode, strength)
            spliced = [self.spliced([]), self.spliced([edit])]
            texts = [self._continue(one, ids, tokens) for one in spliced]
            with torch.no_grad():
                before_V, after_V = (one(input_ids=ids[None]).logits[0, -1].float().softmax(-1) for one in spliced)
        likely = torch.maximum(before_V, after_V).topk(min(NEXT_TOKENS, len(before_V))).indices.tolist()
        shown = sorted(likely, key=lambda token: -float(after_V[token]))
        return {
            "prompt": prompt,
            "clean": texts[0],
            "steered": texts[1],
            "next": [[self._text(token), float(before_V[token]), float(after_V[token])] for token in shown],
        }

    def spliced(self, edits: list[Edit]) -> SplicedModel:
        """The model with the dictionary in it. Raises GranaryError for sites that are no places of one model."""
        if not self.can_steer:
            raise GranaryError("the dictionary has sites that are no places of one model: it can't be spliced into it")
        hook = self.reads[0] if self.latents.meta.dictionary["kind"] == "sae" else None
        return SplicedModel(self.model, self.dictionary, hook, edits=edits)

    def _encode(self, text: str) -> tuple[Tensor, bool]:
        """(ids [T] that begin with BOS where the model has one, whether the text was longer)."""
        if len(text) > TEXT_CHARACTERS:
            raise GranaryError(f"the text has more than {TEXT_CHARACTERS:,} characters")
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        bos = self.tokenizer.bos_token_id
        ids = ([] if bos is None else [bos]) + list(ids)
        if not ids:
            raise GranaryError("the text is empty")
        return torch.tensor(ids[:TEXT_TOKENS]), len(ids) > TEXT_TOKENS

    @torch.no_grad()
    def _latents(self, ids: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Values and indices [T, K]; those of BOS, which no dictionary is trained on, are left out."""
        hooks = [point_of(site) for site in self.reads]
        with capture(self.model, hooks) as captured:
            self.model.base_model(input_ids=ids[None])
        x = side_by_side({site: captured[hook][0] for site, hook in zip(self.reads, hooks, strict=True)}, self.reads)
        is_whole = self.dictionary.config.unit == "sequence"
        latents = self.dictionary.encode(x.float()[None] if is_whole else x.float())
        values, indices = (part.view(len(ids), -1) for part in (latents.values, latents.indices.clone()))
        indices[values == 0] = -1
        if int(ids[0]) == self.tokenizer.bos_token_id:
            indices[0] = -1
        return values.numpy(), indices.numpy()

    def _continue(self, model: SplicedModel, ids: Tensor, tokens: int) -> str:
        full = model.generate(
            ids[None], max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.eos_token_id
        )
        return str(self.tokenizer.decode(full[0, len(ids) :]))

    def _pieces(self, ids: Tensor) -> dict[str, Any]:
        pieces, special = [""] * len(ids), []
        vocabulary = self.latents.vocabulary
        if vocabulary is None:
            return {"pieces": [str(self.tokenizer.decode([token])) for token in ids.tolist()], "special": []}
        for piece in vocabulary.pieces(ids.numpy()):
            pieces[piece.start] = piece.text
            if piece.is_special:
                special.append(piece.start)
        return {"pieces": pieces, "special": special}

    def _text(self, token: int) -> str:
        vocabulary = self.latents.vocabulary
        return vocabulary.text_of(token) if vocabulary is not None else str(self.tokenizer.decode([token]))


def spans(sorted_P: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal values."""
    if not len(sorted_P):
        return []
    starts = np.flatnonzero(np.concatenate([[True], sorted_P[1:] != sorted_P[:-1]]))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(sorted_P)], strict=True))
