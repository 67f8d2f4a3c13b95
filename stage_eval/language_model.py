"""Which language model is spliced into, and whether it is the one that was harvested."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.lm import model_identity
from shared.lm.identity import check_same_model
from shared.store import Store
from stage_eval.config import ModelInput


@dataclass(frozen=True)
class ModelChoice:
    """What to load."""

    path: str
    revision: str | None
    dtype: str


def choose_model(cfg: ModelInput, store: Store) -> ModelChoice:
    """The model to splice into: what is configured, else what the store records.

    Raises GranaryError if the model is not the harvested one and ``model.allow_other`` is not set.
    """
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
            raise GranaryError(f"{error}; model.allow_other=true evaluates it all the same") from None
    return ModelChoice(path, revision, dtype)
