"""Which language model a store was harvested from, and whether another one is the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.basics.config import ModelInput
from shared.basics.errors import GranaryError
from shared.lm.identity import model_identity
from shared.lm.token_bytes import token_bytes
from shared.lm.tokenizer import load_tokenizer, special_ids, tokenizer_hash
from shared.store import Store
from shared.store.same_model import check_same_model


@dataclass(frozen=True)
class ModelChoice:
    """What to load."""

    path: str
    revision: str | None
    dtype: str


def factory_of(store: Store) -> str | None:
    """The function that made the model of a store, by its name (``model.factory``); None for a language model's.

    It is told to people alone: what a store names is never imported.
    """
    found = (store.plan.provenance.get("model") or {}).get("factory")
    return None if found is None else str(found)


def without_next_token(store: Store) -> str | None:
    """What the store's model is, where it is no decoder and so predicts no next token; None for a decoder."""
    if (factory := factory_of(store)) is not None:
        return f"a model that {factory} made"
    kind = (store.plan.provenance.get("model") or {}).get("encoder")
    return None if kind is None else f"an encoder ({kind})"


def choose_model(cfg: ModelInput, store: Store) -> ModelChoice:
    """The model to load: what is configured, else what the store records.

    Raises GranaryError if the model is not the harvested one and ``model.allow_other`` is not set, and where it is no
    language model.
    """
    if (factory := factory_of(store)) is not None:
        raise GranaryError(f"the store at {store.url} is of a model that {factory} made, not of a language model")
    recorded: dict[str, Any] = store.plan.provenance.get("model") or {}
    path, revision = cfg.path, cfg.revision
    if path is None:
        path = recorded.get("id")
        if path is None:
            raise GranaryError(f"the store at {store.url} does not record its model: give model=PATH")
        if recorded.get("revision"):
            revision = recorded["revision"]
        elif path != "bundled":
            path = store.plan.versions.get("model_path", path)
            if not Path(path).is_dir():
                raise GranaryError(f"the harvested model was at {path}, which is not here: give model=PATH")
    dtype = cfg.dtype.value if cfg.dtype is not None else recorded.get("dtype", "float32")
    if not cfg.allow_other:
        try:
            check_same_model(f"model={path}", {**model_identity(path, revision, dtype)}, store.url, recorded)
        except GranaryError as error:
            if "differ" not in str(error):
                raise
            raise GranaryError(f"{error}; model.allow_other=true takes it all the same") from None
    return ModelChoice(path, revision, dtype)


def recorded_vocabulary(cfg: ModelInput, store: Store) -> tuple[list[bytes], tuple[int, ...]]:
    """Bytes of every token that a store was harvested with, by id, and which of the ids are special.

    Raises GranaryError where the tokenizer can't be had, or is another one than the store records.
    """
    choice = choose_model(cfg, store)
    tokenizer = load_tokenizer(choice.path, choice.revision)
    recorded = (store.plan.provenance.get("tokenizer") or {}).get("hash")
    if recorded is not None and tokenizer_hash(tokenizer) != recorded:
        raise GranaryError(f"the tokenizer of {choice.path} is not the one that {store.url} was harvested with")
    return token_bytes(tokenizer), special_ids(tokenizer).all
