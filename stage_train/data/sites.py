"""Which arrays of the stores a run reads and writes: ``hook``, ``reads`` and ``writes``, checked and expanded."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from shared.basics.errors import GranaryError
from shared.basics.numbers import natural_key
from shared.launch.peer_names import site_of
from shared.sae.sites import Sites
from stage_train.config import TrainSchema
from stage_train.data.stores import PinnedStore
from stage_train.sae_schema import kind_of

WILDCARDS = frozenset("*?")


def resolve_sites(cfg: TrainSchema, stores: Sequence[PinnedStore]) -> Sites:
    """The sites that a configuration names; ``hook`` is short for reading and writing the same.

    A side is one site, a list, or patterns such as ``layers.*.mlp_in``, which stand for the sites of the first store
    that match, layer 10 after layer 9. Nothing at all is the only site there is. Raises GranaryError listing what there
    is where a site is absent or not clear, and for keys that say the same thing twice.
    """
    if cfg.hook is not None and (cfg.reads is not None or cfg.writes is not None):
        raise GranaryError("hook is short for reading and writing the same: give hook=..., or reads=... writes=...")
    if cfg.reads is None and cfg.writes is not None:
        raise GranaryError(f"writes={cfg.writes} without reads: give reads=... too")
    first = stores[0].store
    if cfg.hook is None and cfg.reads is None:
        if len(first.hooks) > 1:
            raise GranaryError(f"the store at {first.url} has several hooks: choose hook={' | '.join(first.hooks)}")
        sites = Sites.of(*first.hooks)
    elif cfg.hook is not None:
        sites = Sites.of(*_expand("hook", cfg.hook, stores[0]))
    else:
        reads = _expand("reads", cfg.reads, stores[0])
        sites = Sites(reads, reads if cfg.writes is None else _expand("writes", cfg.writes, stores[0]))
    for part in stores:
        for name in sites.names:
            _check_is_there("hook" if cfg.hook is not None else "site", name, part)
    return replace(sites, unit=kind_of(str(cfg.variant["kind"])).unit)


def site_formats(names: Iterable[str], stores: Sequence[PinnedStore]) -> dict[str, tuple[int, torch.dtype]]:
    """(Width, dtype that is read) of every site. Raises GranaryError where the stores do not agree on them."""
    formats = {}
    for name in dict.fromkeys(names):
        found = {(part.store.width(name), part.store.dtype_of(name)) for part in stores}
        if len(found) != 1:
            raise GranaryError(f"the stores hold {name} with different widths or dtypes: they cannot be read as one")
        (formats[name],) = found
    return formats


def _expand(key: str, value: object, part: PinnedStore) -> tuple[str, ...]:
    """The sites that one key names. Raises GranaryError for a value that is no name, and a pattern without a match."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise GranaryError(f"{key}={value}: give a site of the store, a list, or a pattern such as layers.*.mlp_in")
    found: list[str] = []
    for name in names:
        if not WILDCARDS & set(name):
            _check_is_there("hook" if key == "hook" else "site", name, part)
            found.append(name)
            continue
        matches = sorted((site for site in part.store.hooks if fnmatchcase(site, name)), key=natural_key)
        if not matches:
            raise GranaryError(
                f"{key}={name} matches no site of the store at {part.store.url}: it has {', '.join(part.store.hooks)}"
            )
        found += matches
    return tuple(found)


def _check_is_there(what: str, name: str, part: PinnedStore) -> None:
    available = part.store.hooks
    if name not in available:
        ours = site_of(name)
        meant = f" (did you mean {ours}?)" if ours in available else ""
        raise GranaryError(
            f"{what} {name} is not in the store at {part.store.url}: it has {', '.join(available)}{meant}"
        )
