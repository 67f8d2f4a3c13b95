"""Granary from Python: ``from granary import SAE, load, Store``. Each name is imported when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granary.hub import push_to_hub
    from granary.stages import configure, evaluate, harvest, inspect, train, train_together
    from shared.basics.errors import GranaryError
    from shared.intervene.attach import Attached, attach
    from shared.intervene.attribute import Attribution, attribute
    from shared.intervene.edits import Edit
    from shared.intervene.splice import SplicedModel
    from shared.intervene.where import Where
    from shared.latents import Latents
    from shared.latents.global_weights import GlobalWeights
    from shared.lm import load_causal_lm, load_tokenizer
    from shared.lm.calls import Masked
    from shared.lm.vision.reader import VisionReader
    from shared.sae import (
        CLT,
        SAE,
        Crosscoder,
        Dictionary,
        DictionaryConfig,
        Lorsa,
        MoLT,
        SAEConfig,
        SAEOutput,
        SkipTranscoder,
        SparseLatents,
        Transcoder,
        load,
        load_config,
        load_provenance,
        load_set,
    )
    from shared.sae.learn.objective import Objective
    from shared.sae.loading import convert
    from shared.sae.sites import Sites
    from shared.store import Store, StorePlan
    from stage_inspect.regions.looking import Looking
    from stage_trace.attribution import AttributionGraph
    from stage_trace.trace import TraceSettings, trace
    from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
    from stage_train.online.fit import fit

    __version__: str

# What there is, and where it lives.
_HOMES = {
    "Attached": "shared.intervene.attach",
    "Attribution": "shared.intervene.attribute",
    "AttributionGraph": "stage_trace.attribution",
    "CLT": "shared.sae",
    "SAE": "shared.sae",
    "Crosscoder": "shared.sae",
    "Dictionary": "shared.sae",
    "DictionaryConfig": "shared.sae",
    "Edit": "shared.intervene.edits",
    "GlobalWeights": "shared.latents.global_weights",
    "GranaryError": "shared.basics.errors",
    "Latents": "shared.latents",
    "Looking": "stage_inspect.regions.looking",
    "Lorsa": "shared.sae",
    "Masked": "shared.lm.calls",
    "MoLT": "shared.sae",
    "Objective": "shared.sae.learn.objective",
    "SAEConfig": "shared.sae",
    "SAEOutput": "shared.sae",
    "Sites": "shared.sae.sites",
    "SkipTranscoder": "shared.sae",
    "SparseLatents": "shared.sae",
    "SplicedModel": "shared.intervene.splice",
    "Store": "shared.store",
    "StorePlan": "shared.store",
    "StoreSlice": "stage_train.data.stream",
    "StreamOrder": "stage_train.data.stream",
    "TokenStream": "stage_train.data.stream",
    "TraceSettings": "stage_trace.trace",
    "TrainingData": "stage_train.data.stream",
    "Transcoder": "shared.sae",
    "VisionReader": "shared.lm.vision.reader",
    "Where": "shared.intervene.where",
    "attach": "shared.intervene.attach",
    "attribute": "shared.intervene.attribute",
    "configure": "granary.stages",
    "convert": "shared.sae.loading",
    "evaluate": "granary.stages",
    "fit": "stage_train.online.fit",
    "harvest": "granary.stages",
    "inspect": "granary.stages",
    "load": "shared.sae",
    "load_causal_lm": "shared.lm",
    "load_config": "shared.sae",
    "load_provenance": "shared.sae",
    "load_set": "shared.sae",
    "load_tokenizer": "shared.lm",
    "push_to_hub": "granary.hub",
    "trace": "stage_trace.trace",
    "train": "granary.stages",
    "train_together": "granary.stages",
}

__all__ = [
    "CLT",
    "SAE",
    "Attached",
    "Attribution",
    "AttributionGraph",
    "Crosscoder",
    "Dictionary",
    "DictionaryConfig",
    "Edit",
    "GlobalWeights",
    "GranaryError",
    "Latents",
    "Looking",
    "Lorsa",
    "Masked",
    "MoLT",
    "Objective",
    "SAEConfig",
    "SAEOutput",
    "Sites",
    "SkipTranscoder",
    "SparseLatents",
    "SplicedModel",
    "Store",
    "StorePlan",
    "StoreSlice",
    "StreamOrder",
    "TokenStream",
    "TraceSettings",
    "TrainingData",
    "Transcoder",
    "VisionReader",
    "Where",
    "__version__",
    "attach",
    "attribute",
    "configure",
    "convert",
    "evaluate",
    "fit",
    "harvest",
    "inspect",
    "load",
    "load_causal_lm",
    "load_config",
    "load_provenance",
    "load_set",
    "load_tokenizer",
    "push_to_hub",
    "trace",
    "train",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from shared.basics.versions import granary_version

        return granary_version()
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_suggestion(name)}")
    from granary.neighbours import shadowed

    if (problem := shadowed()) is not None:
        raise ImportError(problem)
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _suggestion(name: str) -> str:
    import difflib

    folded = {known.lower(): known for known in _HOMES}
    close = [folded[one] for one in difflib.get_close_matches(name.lower(), folded)]
    return f": did you mean {' or '.join(close)}?" if close else ""
