"""SAEs that were attached to a model, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

    {"peft_type": "GRANARY_SAE", "target_modules": [...], "dictionaries": {place: what config.json holds}, ...}
    base_model.model.<place>.sae_<tensor>

Hubs and tools that look at adapters find what they look for; PEFT itself has no adapter of this type. SAE Made Easy's
folders, of the same layout, are read by ``shared.sae.formats.sae_made_easy``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError
from shared.intervene.saved import Saved
from shared.sae.folder import from_document, to_document
from shared.sae.formats import load as load_foreign
from shared.sae.formats.files import read_tensors
from shared.sae.formats.sae_made_easy import CONFIG, PREFIX, WEIGHTS, modules_of
from shared.sae.loading import BY_KIND
from shared.sae.variants import SAE

PEFT_TYPE, TENSOR = "GRANARY_SAE", ".sae_"


def is_adapter(folder: Path) -> bool:
    """Whether a folder has PEFT's layout."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, saes: Mapping[str, Saved]) -> None:
    """Write both files into an empty folder."""
    models = [one.provenance.get("model") for one in saes.values()]
    base = next((model["id"] for model in models if isinstance(model, Mapping) and "id" in model), None)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "dictionaries": {
            place: to_document(one.sae.config, one.training, one.provenance) for place, one in saes.items()
        },
        "inference_mode": True,
        "peft_type": PEFT_TYPE,
        "revision": None,
        "target_modules": list(saes),
        "task_type": None,
    }
    tensors = {
        f"{PREFIX}{place}{TENSOR}{name}": tensor.cpu().contiguous().clone()  # one SAE may be at two places
        for place, one in saes.items()
        for name, tensor in one.sae.state_dict().items()
    }
    save_file(tensors, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> dict[str, Saved]:
    """The SAEs by their places, of a folder that ``write_adapter`` or SAE Made Easy wrote.

    Raises GranaryError for another adapter, and for one whose tensors are not those that its configuration tells of.
    """
    config = read_json(folder / CONFIG)
    tensors = read_tensors(folder, WEIGHTS)
    if config.get("peft_type") != PEFT_TYPE:
        modules: list[str | None] = [*modules_of(tensors)]
        return dict(_foreign(folder, module) for module in modules or [None])
    documents = typed_at(config, "dictionaries", dict[str, dict[str, Any]], folder / CONFIG)
    longest_first = sorted(documents, key=len, reverse=True)  # one name may begin with another
    read = {place: _own(folder, place, documents[place], tensors) for place in longest_first}
    found = {place: read[place] for place in documents}
    if tensors or not found:
        what = f"has the tensor {min(tensors)}" if tensors else "holds no SAE"
        raise GranaryError(f"{folder} {what}, other than {CONFIG} tells: it is damaged")
    return found


def _own(folder: Path, place: str, document: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Saved:
    """One SAE; its tensors are taken out of `tensors`."""
    where = f"{folder / CONFIG}, {place}"
    try:
        description = from_document(document, document["provenance"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise GranaryError(f"{where} is incomplete or of a wrong type: {error!r}") from None
    begin = f"{PREFIX}{place}{TENSOR}"
    own = {name.removeprefix(begin): tensors.pop(name) for name in list(tensors) if name.startswith(begin)}
    made = SAE.from_tensors(description.config([SAE.config_class]), own, where)
    return Saved(made, description.provenance, description.training)


def _foreign(folder: Path, module: str | None) -> tuple[str, Saved]:
    raw = load_foreign("sae_made_easy", folder, given={} if module is None else {"module": module})
    config, tensors = raw.to_checkpoint(BY_KIND)
    return str(raw.provenance["hook"]), Saved(SAE.from_tensors(config, tensors, str(folder)), raw.provenance)
