"""Names of places in a transformer, as the field writes them: ``layers.16.resid_post``."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from shared.basics.errors import GranaryError

SITES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
_PATTERN = re.compile(r"layers\.(\d+)\.(\w+)")


@dataclass(frozen=True, order=True, slots=True)
class HookPoint:
    """One activation of one decoder layer.

    ``resid_post`` of layer L is the residual stream after decoder layer L (0-based), which TransformerLens calls
    ``blocks.L.hook_resid_post`` and OpenSAE calls ``layers.L``. ``resid_pre`` is the stream before that layer.
    """

    layer: int
    site: str

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise GranaryError(f"unknown hook site {self.site!r}: choose from {', '.join(SITES)}")
        if self.layer < 0:
            raise GranaryError(f"layer {self.layer} is negative: layers are counted from 0")

    @classmethod
    def parse(cls, name: str) -> Self:
        """``"layers.16.resid_post"`` to a hook point; raises GranaryError on any other form."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise GranaryError(f"{name!r} is not a hook: write layers.<L>.<site>, for example layers.2.resid_post")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.site}"


def parse_layers(layers: str, num_layers: int) -> list[int]:
    """``"all"``, ``"3"``, ``"0,4,8"``, ``"0-7"`` or a mixture to sorted layer numbers below `num_layers`.

    Raises GranaryError when a part is not understood or names a layer the model does not have.
    """
    if layers.strip() == "all":
        return list(range(num_layers))
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise GranaryError(f"layers={layers!r}: write all, a number, a list 0,4,8 or a range 0-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise GranaryError(f"layers={layers!r}: the range {part.strip()} runs backwards")
        chosen.update(range(first, last + 1))
    if max(chosen) >= num_layers:
        raise GranaryError(
            f"layer {max(chosen)} is not in the model: it has {num_layers} layers, 0 to {num_layers - 1}"
        )
    return sorted(chosen)


def hook_points(layers: str, sites: Sequence[str] | Iterable[str], num_layers: int) -> list[HookPoint]:
    """Every site at every chosen layer, in layer order."""
    sites = list(sites)
    return [HookPoint(layer, site) for layer in parse_layers(layers, num_layers) for site in sites]


def describe_hooks(hooks: Sequence[HookPoint]) -> str:
    """One short line: the names of up to four hooks; of more ``resid_post, mlp_out of layers 0-31``."""
    if len(hooks) <= 4:
        return ", ".join(map(str, hooks))
    layers_of: dict[str, list[int]] = {}
    for hook in hooks:
        layers_of.setdefault(hook.site, []).append(hook.layer)
    sites_of: dict[str, list[str]] = {}
    for site, layers in layers_of.items():
        sites_of.setdefault(_ranges(layers), []).append(site)
    return "; ".join(f"{', '.join(sites)} of layers {ranges}" for ranges, sites in sites_of.items())


def _ranges(layers: Sequence[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
