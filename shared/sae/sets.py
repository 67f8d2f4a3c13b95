"""Sets of dictionaries that together stand in for one kind of place at every layer, such as a transcoder per MLP."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.files import making_folder
from shared.basics.numbers import natural_key
from shared.lm.hookpoint import HookPoint
from shared.sae.folder import is_own, load_provenance
from shared.sae.formats.circuit_tracer_folder import matches
from shared.sae.formats.folded import Folded
from shared.sae.loading import Change, check_new, load
from shared.sae.members import of_circuit_tracer
from shared.sae.variants import CLT, Dictionary


def load_set(where: str | Path | Sequence[str | Path], *, device: str | torch.device = "cpu") -> dict[int, Dictionary]:
    """Dictionaries by the layer that they write, ascending: of a folder with one per layer in it, a list of them, or a
    folder in circuit-tracer's format. A CLT, which writes several, stands at the first of them.

    What counts is the sites that each records, not how its folder is called; layers may be missing. Raises GranaryError
    for a folder without dictionaries, one that does not record what it writes, and a layer that has two.
    """
    opened: list[tuple[str, Callable[[], Dictionary]]]
    if isinstance(where, str | Path) and matches(Path(where)):
        opened = [(member.name, member.open) for member in of_circuit_tracer(Path(where), device)]
    else:
        folders = folders_of(where) if isinstance(where, str | Path) else list(where)
        opened = [(str(folder), partial(load, folder, device=device)) for folder in folders]
    if not opened:
        raise GranaryError(f"no dictionary in {where}: give the folder that holds one per layer, or a list of folders")
    found: dict[int, Dictionary] = {}
    taken: dict[int, str] = {}
    for folder, read in opened:
        one = read()
        if one.sites is None or not (len(one.sites.writes) == 1 or isinstance(one, CLT)):
            raise GranaryError(f"{folder} does not record the one site that it writes, so it has no layer in a set")
        layers = [HookPoint.parse(site).layer for site in one.sites.writes]
        for layer in layers:
            if layer in taken:
                raise GranaryError(f"{taken[layer]} and {folder} both write layer {layer}: a set has one per layer")
            taken[layer] = folder
        found[min(layers)] = one
    return dict(sorted(found.items()))


def folders_of(where: str | Path) -> list[Path]:
    """The dictionary folders directly in `where`, or itself where it is one."""
    if is_own(Path(where)):
        return [Path(where)]
    inside = Path(where).iterdir() if Path(where).is_dir() else ()
    return sorted((folder for folder in inside if is_own(folder)), key=lambda folder: natural_key(folder.name))


SET_FORMATS = ("circuit_tracer",)
"""Formats of other projects that hold all layers in one folder."""


def convert_set(source: str | Path, target: Path, to: str, change: Change | None = None) -> str:
    """Write a set of transcoders, a folder with one per layer, or a CLT as format `to`; returns what it was.

    `change` is made to each dictionary before. Raises GranaryError for a target that holds files, and for what the
    format can't express.
    """
    if to not in SET_FORMATS:
        raise GranaryError(f"format {to!r} can't be written for a set: choose from {', '.join(SET_FORMATS)}")
    from shared.sae.formats import circuit_tracer  # needs omegaconf, which loading does not

    if matches(Path(source)):
        raise GranaryError(f"{source} is in circuit-tracer's format already")
    check_new(target)
    if is_own(Path(source)) and isinstance(made := load(source), CLT):
        clt = folded(made, load_provenance(source), change, str(source))
        with telling_disk_errors(target), making_folder(target) as filled:
            circuit_tracer.save_clt(clt, filled, target.name)
        return "granary clt"
    first = next(iter(folders_of(source)), None)
    provenance = {} if first is None else load_provenance(first)  # the model is that of all layers
    made_of = load_set(source)
    if any(isinstance(one, CLT) for one in made_of.values()):
        raise GranaryError(f"{source} holds a CLT, which fills a folder of its own: give the folder that it lies in")
    layers = {layer: folded(one, provenance, change, f"{source}, layer {layer}") for layer, one in made_of.items()}
    with telling_disk_errors(target), making_folder(target) as filled:
        circuit_tracer.save_set(layers, filled, target.name)
    return "granary set"


def folded(made: Dictionary, provenance: dict[str, Any], change: Change | None, where: str) -> Folded:
    """Return a dictionary on raw activations, as circuit-tracer reads it, once `change` is made."""
    if change is not None:
        made, provenance = change(where, made, provenance)
    tensors = made.untied() if isinstance(made, CLT) else made.state_dict()
    return Folded.of(made.config, tensors, made.places, provenance, SET_FORMATS[0])
