"""From what a user writes to places in a model: names of hooks, paths of modules, ``re:`` patterns of paths."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import SITES, HookPoint
from shared.lm.modulepoint import ModulePoint, Point
from shared.lm.places import decoder_blocks, find_module, locate, without_wrappers

PATTERN = "re:"
NEAR = 5


def resolve(model: nn.Module, target: str) -> list[Point]:
    """The places that `target` names in `model`, which may be wrapped by peft or torch.compile; at least one.

    ``re:`` begins a pattern that a whole path must match, as peft's; each module that does is meant, once where it has
    several names. A module's own path goes before the name of a hook. Raises GranaryError that lists near names where
    nothing is found.
    """
    inner = without_wrappers(model)
    if target.startswith(PATTERN):
        return _matching(inner, target)
    point = ModulePoint.parse(target)
    for named in (point, ModulePoint.of_site(target)):
        if named is not None and find_module(inner, named.path) is not None:
            return [named]
    if _num_layers(inner) and (hook := _as_hook(target)) is not None:
        locate(inner, hook)
        return [hook]
    raise GranaryError(f"{type(inner).__name__} has no module {point.path}: {_near(inner, point.path)}")


def point_of(name: str) -> Point:
    """What `resolve` found, from its text or the name of a site: a hook where it has the form of one, else a module."""
    return _as_hook(name) or ModulePoint.of_site(name) or ModulePoint.parse(name)


def _num_layers(model: nn.Module) -> int:
    """Decoder layers of a model; 0 of one that has none."""
    try:
        return len(decoder_blocks(model))
    except GranaryError:
        return 0


def _as_hook(name: str) -> HookPoint | None:
    try:
        return HookPoint.parse(name)
    except GranaryError:
        return None


def _matching(model: nn.Module, target: str) -> list[Point]:
    wanted = ModulePoint.parse(target.removeprefix(PATTERN))
    try:
        pattern = re.compile(wanted.path)
    except re.error as error:
        raise GranaryError(f"{target} is no regular expression: {error}") from None
    paths = [path for path, _ in model.named_modules() if path]
    found = [replace(wanted, path=path) for path in paths if pattern.fullmatch(path)]
    if not found:
        inside = [path for path in paths if pattern.search(path)]
        hint = _listed(inside) if inside else _near(model, wanted.path)
        raise GranaryError(f"{target} matches no whole path of a module of {type(model).__name__}: {hint}")
    return list[Point](found)


def _near(model: nn.Module, path: str) -> str:
    """What the user may have meant."""
    paths = [name for name, _ in model.named_modules() if name]
    ends = [name for name in paths if name.endswith(f".{path}")]
    hooks = [f"layers.{layer}.{site}" for layer in range(_num_layers(model)) for site in SITES]
    close = difflib.get_close_matches(path, [*hooks, *paths], n=NEAR)
    return _listed(list(dict.fromkeys([*ends, *close]))) or "model.named_modules() lists what there is"


def _listed(names: Sequence[str]) -> str:
    more = f" (and {len(names) - NEAR} more)" if len(names) > NEAR else ""
    return f"did you mean {', '.join(names[:NEAR])}{more}?" if names else ""
