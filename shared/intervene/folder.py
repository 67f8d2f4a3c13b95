"""SAEs that were attached to a model, on disk: a folder with a dictionary folder for each.

    folder/model.layers.2.mlp/config.json, sae.safetensors

Which place an SAE belongs to stands in its ``config.json`` as its site, and nowhere else: the folders' names are for
people. So a folder of SAEs that ``stage_train`` made, or one of them, is read alike; PEFT's layout is that of
``shared.intervene.adapters``.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.files import making_folder
from shared.intervene.adapters import is_adapter, read_adapter, write_adapter
from shared.intervene.saved import Saved
from shared.sae.folder import describe, locate
from shared.sae.loading import check_new, load
from shared.sae.sets import folders_of
from shared.sae.sites import Sites
from shared.sae.variants import SAE

Layout = Literal["granary", "peft"]


def read_attached(path_or_hub_id: str | Path, device: torch.device) -> dict[str, Saved]:
    """The SAEs of a folder, or that which the folder is, by the place that each records.

    Raises GranaryError for one without SAEs, for a dictionary that is no SAE or records no place, and for a place that
    two record.
    """
    where = locate(path_or_hub_id)
    if is_adapter(where):
        read = read_adapter(where)
        return {name: replace(one, sae=one.sae.to(device).requires_grad_(False)) for name, one in read.items()}
    folders = folders_of(where)
    if not folders:
        raise GranaryError(f"there is no SAE in {path_or_hub_id}: give a folder that save_pretrained wrote")
    found: dict[str, Saved] = {}
    for folder in folders:
        made, description = load(folder, device=device), describe(folder)
        if not isinstance(made, SAE):
            raise GranaryError(f"{folder} is a {made.config.kind}, no SAE: SplicedModel takes every kind")
        if made.sites is None:
            raise GranaryError(
                f"{folder} records no place: attach it by name, attach(model, {{'layers.2.resid_post': sae}})"
            )
        (name,) = made.sites.reads
        if name in found:
            raise GranaryError(f"two SAEs in {path_or_hub_id} record {name}: attach one of them")
        found[name] = Saved(made.requires_grad_(False), description.provenance, description.training)
    return found


def write_attached(folder: Path, saes: Mapping[str, Saved], layout: Layout = "granary") -> None:
    """Write the SAEs of places; the folder appears whole or not at all.

    Raises GranaryError where it holds files, and for a layout that is not known.
    """
    if layout not in get_args(Layout):
        raise GranaryError(f"layout={layout!r}: choose from {', '.join(get_args(Layout))}")
    check_new(folder)
    placed = {name: _at(name, one) for name, one in saes.items()}
    with telling_disk_errors(folder), making_folder(folder) as filled:
        if layout == "peft":
            write_adapter(filled, placed)
            return
        for number, (name, one) in enumerate(placed.items()):
            one.sae.save_pretrained(filled / folder_name(name, number), dict(one.provenance), dict(one.training))


def _at(name: str, one: Saved) -> Saved:
    """The same, recording the place."""
    sites = Sites.of(name)
    made = SAE.from_tensors(replace(one.sae.config, sites=sites), one.sae.state_dict(), name)
    return Saved(made, {**one.provenance, **sites.record()}, one.training)


def folder_name(place: str, number: int) -> str:
    """A name that any file system takes; `number` keeps apart those that would be alike."""
    plain = re.sub(r"[^\w.\[\]@-]", "-", place)
    return plain if plain == place and len(plain) < 100 and not plain.startswith(".") else f"{number}-{plain[-80:]}"
