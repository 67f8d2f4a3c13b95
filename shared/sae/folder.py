"""The SAE checkpoint on disk: a folder with ``config.json`` and ``sae.safetensors``.

``config.json`` is ``{"format": "granary-sae", "version": 1, "config": {...}, "provenance": {...}}``. The safetensors
file carries the same JSON in its metadata, so that a save which died between the two files is noticed when loading.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.basics.errors import GranaryError
from shared.basics.files import replacing
from shared.basics.run_folder import CONFIG_FILE, WEIGHTS_FILE, RunFolder
from shared.sae.config import SAEConfig
from shared.sae.weights_file import write_weights

FORMAT = "granary-sae"
VERSION = 1
# What an SAE at the top of a hub repository may consist of, in this format or another that shared.sae.formats reads.
HUB_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "cfg.json",
    "sae_weights.safetensors",
    "activation_scaler.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "ae.pt",
    "hyperparams.json",
    "checkpoints/final.safetensors",
    "params.npz",
    "params.safetensors",
)


def save(
    folder: Path,
    config: SAEConfig,
    tensors: Mapping[str, torch.Tensor],
    provenance: dict[str, Any],
    *,
    fetch: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write both files; each appears whole or not at all, and a mixture of two saves does not load.

    With `fetch` the tensors give names, shapes and types alone, and it gives each one's values when it is its turn.
    """
    document = {"format": FORMAT, "version": VERSION, "config": config.to_dict(), "provenance": provenance}
    text = json.dumps(document, indent=2, sort_keys=True)
    files = RunFolder(folder)
    with replacing(files.config) as config_file, replacing(files.weights) as weights_file:  # the weights go first
        config_file.write(f"{text}\n".encode())
        write_weights(weights_file, tensors, fetch or tensors.__getitem__, {"granary": text})


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[SAEConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Config, tensors and provenance of a folder; raises GranaryError when a file is missing, torn or foreign."""
    config, provenance, text = _read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise GranaryError(f"{folder} has no {WEIGHTS_FILE}: point at a folder that a training run exported")
    try:
        with safe_open(weights, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("granary") != text:
                raise GranaryError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are of different saves; export again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise GranaryError(f"{weights} is damaged ({error}); export the SAE again") from None
    return config, tensors, provenance


def load_config(folder: str | Path) -> SAEConfig:
    """The config of a saved SAE, without reading its weights."""
    return _read_config(Path(folder))[0]


def load_provenance(folder: str | Path) -> dict[str, Any]:
    """What ``save`` was told about where the SAE comes from."""
    return _read_config(Path(folder))[1]


def is_own(folder: Path) -> bool:
    """Whether the folder has the files of this project's format."""
    return RunFolder(folder).has_dictionary


def locate(path_or_hub_id: str | Path) -> Path:
    """A local folder as it is; owner/name, or hf://owner/name/folder, is downloaded from the Hugging Face hub."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    owner, _, rest = name.removeprefix("hf://").partition("/")
    repository, _, inside = rest.partition("/")
    is_path = path.is_absolute() or name.startswith((".", "~")) or (inside and not name.startswith("hf://"))
    if is_path or not (owner and repository):
        raise GranaryError(f"there is no SAE folder {name}: train one, or give a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{inside.strip('/')}/*"] if inside else [*HUB_FILES]
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted)) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GranaryError(f"{name} is neither a folder nor a hub repository that can be reached: {reason}") from None
    if not folder.is_dir():
        raise GranaryError(f"the hub repository {owner}/{repository} has no folder {inside}")
    return folder


def _read_config(folder: Path) -> tuple[SAEConfig, dict[str, Any], str]:
    path = folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        document = json.loads(text)
    except FileNotFoundError:
        raise GranaryError(f"{folder} has no {CONFIG_FILE}: point at a folder that a training run exported") from None
    except ValueError as error:
        raise GranaryError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise GranaryError(f"{path} does not describe an SAE of this project (format {FORMAT!r})")
    if document["version"] > VERSION:
        raise GranaryError(f"{path} has format version {document['version']}, this program reads up to {VERSION}")
    return SAEConfig.from_dict(document["config"]), document.get("provenance", {}), text
