"""Names of places in any tree of modules, as a user writes them: ``vision.layers.3``, ``encoder.conv2:in``.

    path [:in | :out] [[number or name]] [@axis]

A path is that of ``named_modules()``. ``:in`` is what goes into the module, ``:out`` what comes out of it, the default;
``[1]`` or ``[name]`` says which one where it is several (arguments, a tuple, a mapping); ``@1`` which axis holds the
features. As the name of a site in a store, ``:in`` is ``-in`` and ``:out[1]`` is ``-out-1``.
"""

import re
from dataclasses import dataclass
from typing import Literal, Self

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint

Side = Literal["input", "output"]

SIDES: dict[str, Side] = {"in": "input", "out": "output"}
_SITE = re.compile(r"(?P<path>[\w.]+)(?:-(?P<side>in|out)(?:-(?P<select>\w+))?)?", re.ASCII)
_PATTERN = re.compile(r"(?P<path>.+?)(?::(?P<side>in|out)(?:\[(?P<select>\w+)\])?)?(?:@(?P<axis>-?\d+))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModulePoint:
    """What goes into or comes out of one module."""

    path: str
    side: Side = "output"
    select: int | str | None = None
    """Which of several arguments or results; None: the only one, or the first."""
    axis: int | None = None
    """Which axis holds the features; None: the last, and of a convolution that of its channels."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read the form above; the path may be a pattern. Raises GranaryError for an empty one."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise GranaryError("a place in a model needs a name: that of a module, as model.named_modules() gives it")
        axis = match["axis"]
        return cls(match["path"], SIDES[match["side"] or "out"], _selected(match), None if axis is None else int(axis))

    @classmethod
    def of_site(cls, name: str) -> Self | None:
        """The place that a site of a store is named after, by `site`; None for a name of another form."""
        match = _SITE.fullmatch(name)
        return None if match is None else cls(match["path"], SIDES[match["side"] or "out"], _selected(match))

    @property
    def site(self) -> str:
        """Its name as a site of a store, where an axis has no place: a row is a token's features."""
        return self._written("-in", "-out", "-{}")

    def __str__(self) -> str:
        return f"{self._written(':in', ':out', '[{}]')}{'' if self.axis is None else f'@{self.axis}'}"

    def _written(self, goes_in: str, comes_out: str, selected: str) -> str:
        side = "" if self.side == "output" and self.select is None else goes_in if self.side == "input" else comes_out
        return f"{self.path}{side}{'' if self.select is None else selected.format(self.select)}"


def _selected(match: re.Match[str]) -> int | str | None:
    select: str | None = match["select"]
    return int(select) if select is not None and select.isdecimal() else select


Point = HookPoint | ModulePoint
"""A place in a model: of a decoder, by the field's names, or of any tree of modules."""


def site_of(point: Point) -> str:
    """Name of a place as a site of a store."""
    return point.site if isinstance(point, ModulePoint) else str(point)
