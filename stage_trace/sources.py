"""Which dictionaries a graph is made of, and whether they were taught the model that it is of."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.basics.errors import GranaryError
from shared.lm.recorded import check_same_model
from shared.sae.finding import expand
from shared.sae.folder import describe, locate
from shared.sae.for_store import check_whole
from shared.sae.loading import KINDS, load
from shared.sae.variants import Dictionary
from stage_trace.replacement import places_of
from stage_trace.session import Source


def find_sources(
    paths: Sequence[str | Path], device: torch.device | str = "cpu", model: Mapping[str, Any] | None = None
) -> list[Source]:
    """The dictionaries that `paths` name: folders, folders of folders, globs, hub ids; none is loaded yet.

    `model`: the identity of the model that the graph is of. Raises GranaryError for a path without dictionaries, for
    one that is no stand-in of an MLP, and for one that was taught another model.
    """
    found: dict[str, Source] = {}
    for path in paths:
        for name in expand(str(path)):
            folder = locate(name)
            check_whole(name, folder)
            description = describe(folder)
            config = description.config(KINDS)
            if model is not None:
                taught = description.provenance.get("model") or {}
                check_same_model(name, taught, "the graph", {**model})
            found[name] = Source(name, places_of(config, name), partial(load, folder, device=device))
    return list(found.values())


def of_dictionary(dictionary: Dictionary) -> Source:
    """One that is loaded."""
    name = f"the {dictionary.config.kind} of {dictionary.sites}"
    return Source(name, places_of(dictionary.config, name), lambda: dictionary)


def need_any(sources: Sequence[Source]) -> None:
    """Raise GranaryError where there is no dictionary at all."""
    if not sources:
        raise GranaryError("give at least one transcoder folder: granary trace RUN text=...")
