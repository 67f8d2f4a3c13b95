"""Names of places in any tree of modules, as a user writes them: ``vision.layers.3``, ``encoder.conv2:in``.

    path [:in | :out] [[number or name]] [@axis]

A path is that of ``named_modules()``. ``:in`` is what goes into the module, ``:out`` what comes out of it, the default;
``[1]`` or ``[name]`` says which one where it is several (arguments, a tuple, a mapping); ``@1`` which axis holds the
features.
"""

import re
from dataclasses import dataclass
from typing import Literal, Self

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint

Side = Literal["input", "output"]

SIDES: dict[str, Side] = {"in": "input", "out": "output"}
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
        select, axis = match["select"], match["axis"]
        return cls(
            match["path"],
            SIDES[match["side"] or "out"],
            int(select) if select is not None and select.isdecimal() else select,
            None if axis is None else int(axis),
        )

    def __str__(self) -> str:
        side = "" if self.side == "output" and self.select is None else ":in" if self.side == "input" else ":out"
        select = "" if self.select is None else f"[{self.select}]"
        return f"{self.path}{side}{select}{'' if self.axis is None else f'@{self.axis}'}"


Point = HookPoint | ModulePoint
"""A place in a model: of a decoder, by the field's names, or of any tree of modules."""
