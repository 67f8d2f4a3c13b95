"""Where a model's files are and which model they hold, without reading the weights."""

import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shared.basics.documents import read_json
from shared.basics.errors import GranaryError, told_of
from shared.bundled import MODEL_DIR
from shared.lm.vision.families import FAMILIES

log = logging.getLogger(__name__)

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Up to this many bytes of weights are hashed whole; above, only each file's header (names, dtypes, shapes) and size.
FULL_HASH_BYTES = 64 << 20


class ModelIdentity(TypedDict):
    """What tells one language model from another; part of a store's identity."""

    id: str
    """``bundled``, the hub id, or the name of the local folder (not its path: a model may be moved)."""
    revision: str | None
    """The hub commit; None for a local folder."""
    config_hash: str
    """SHA-256 of the canonical JSON of ``config.json`` without the keys that only record software versions."""
    weights_hash: str
    """SHA-256 of the safetensors files' contents, or of their headers and sizes above `FULL_HASH_BYTES`."""
    dtype: str
    """Precision the model was run in: float32, bfloat16, float16."""


def resolve_model(path: str, revision: str | None = None) -> Path:
    """The local folder of the model `path`: ``bundled``, a folder in Hugging Face form, or a hub id (downloaded).

    Raises GranaryError for a folder without ``config.json`` or safetensors, and for a hub id that can't be had.
    """
    if path == "bundled":
        return _checked(MODEL_DIR, "bundled")
    folder = Path(path).expanduser()
    if folder.exists():
        return _checked(folder, path)
    if not _HUB_ID.fullmatch(path):
        raise GranaryError(f"no model folder at {path}: give a folder in Hugging Face form, a hub id, or bundled")
    return _checked(_download(path, revision), path)


def model_identity(path: str, revision: str | None = None, dtype: str = "float32") -> ModelIdentity:
    """The identity of the model at `path` (see `resolve_model`) when it runs in `dtype`."""
    folder = resolve_model(path, revision)
    if path == "bundled":
        name, commit = "bundled", None
    elif Path(path).expanduser().exists():
        name, commit = folder.resolve().name, None
    else:
        name, commit = path, folder.name  # the hub cache names a snapshot's folder by its commit
    config = read_json(folder / "config.json")
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return ModelIdentity(
        id=name,
        revision=commit,
        config_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        weights_hash=_weights_hash(folder),
        dtype=dtype,
    )


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The transformers configuration of a text decoder; raises GranaryError for any other kind of model."""
    config = load_trunk_config(path, revision)
    if config.get_text_config(decoder=True) is not config:
        raise GranaryError(
            f"model {path} is multimodal ({config.model_type}): only text decoders work here; harvest, train and score"
            " the reconstruction (downstream=false) are for models that read images too"
        )
    return config


def load_trunk_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a text decoder, or of a vision-language model of a known family.

    Of the latter it is that of the whole model; ``get_text_config()`` is the decoder's. Raises GranaryError for any
    other kind of model.
    """
    config = read_config(path, revision)
    if config.model_type in FAMILIES:
        return config
    is_decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(
        config, "is_encoder_decoder", False
    )
    if not is_decoder:
        raise GranaryError(f"model {path} is a {config.model_type}, not a causal language model: choose a decoder")
    if config.get_text_config(decoder=True) is not config:
        raise GranaryError(
            f"model {path} is multimodal ({config.model_type}): of models that read more than text"
            f" {', '.join(FAMILIES)} are known"
        )
    return config


def read_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The transformers configuration of any model; raises GranaryError for one that can't be read."""
    folder = resolve_model(path, revision)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of several libraries, from a file that may hold anything
        raise GranaryError(f"model {path}: transformers can't read its config.json: {told_of(error)}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no reports of unused weights: the callers check what was loaded themselves."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _checked(folder: Path, path: str) -> Path:
    if not (folder / "config.json").is_file():
        raise GranaryError(f"model {path}: {folder} holds no config.json: give a folder in Hugging Face form")
    if not any(folder.glob("*.safetensors")):
        raise GranaryError(f"model {path}: {folder} holds no *.safetensors: save it with model.save_pretrained(folder)")
    return folder


def _download(hub_id: str, revision: str | None) -> Path:
    """Fetch a hub repository's safetensors and tokenizer into the local cache, or find them there when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    neither = f"model {hub_id!r} is neither a folder here nor"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise GranaryError(f"model {hub_id} is gated: accept its licence on the hub, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise GranaryError(f"model {hub_id} has no revision {revision!r} on the Hugging Face hub") from error
    except RepositoryNotFoundError as error:
        raise GranaryError(f"{neither} on the Hugging Face hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise GranaryError(f"{neither} in the hub's local cache, and the hub can't be reached") from error


def _weights_hash(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    is_small = sum(file.stat().st_size for file in files) <= FULL_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            length = size
            if not is_small:
                prefix = stream.read(8)
                length = 8 + struct.unpack("<Q", prefix)[0]
                stream.seek(0)
            digest.update(stream.read(length))
    return digest.hexdigest()
