"""Where the latents of a graph read and write, and which dictionaries can stand in for what at all.

An output is what one branch of a layer adds to the stream: ``layers.3.mlp_out``, or ``layers.3.attn_out``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint
from shared.sae.config import DictionaryConfig
from shared.sae.sites import Sites

READABLE = {"mlp_out": ("mlp_in", "resid_mid", "resid_pre"), "attn_out": ("attn_in",)}
"""By what latents write: what they may read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one group of latents reads, and the outputs that it stands in for."""

    read: HookPoint
    writes: tuple[HookPoint, ...]
    """Its own layer's first; of a CLT those of later layers too."""

    @property
    def own(self) -> HookPoint:
        """The output of the layer that it reads."""
        return self.writes[0]


def places_of(config: DictionaryConfig, name: str) -> tuple[Place, ...]:
    """Return those of each group. Raises GranaryError, naming `name`, for no stand-in of MLPs or attention."""
    sites = config.sites
    if sites is None:
        raise GranaryError(f"{name} does not record where it reads and writes: graphs need a transcoder that does")
    if not config.writes_rows:
        raise GranaryError(
            f"{name} is a {config.kind}, whose latents are maps of what they read: graphs need latents that write a row"
        )
    if config.num_groups > 1 and not config.follows_depth:
        raise GranaryError(
            f"{name} takes the k largest of all layers, so that later ones decide what earlier ones fire: use batchtopk"
        )
    found = _in_order(sites, config.num_groups, "attn_out" if config.unit == "sequence" else "mlp_out")
    if found is None:
        raise GranaryError(
            f"{name} has {sites}: graphs need transcoders of MLPs, such as layers.2.mlp_in -> layers.2.mlp_out, or a"
            " CLT, and for attention a lorsa, such as layers.2.attn_in -> layers.2.attn_out"
        )
    return found


def _in_order(sites: Sites, groups: int, written: str) -> tuple[Place, ...] | None:
    """The places of groups that read and write each its own layer, in order of depth; None of any others."""
    if not len(sites.reads) == groups == len(sites.writes):
        return None
    reads = [HookPoint.parse(one) for one in sites.reads]
    writes = tuple(HookPoint.parse(one) for one in sites.writes)
    layers = [one.layer for one in writes]
    in_order = [one.layer for one in reads] == layers == sorted(set(layers))
    is_known = all(one.site in READABLE[written] for one in reads) and {one.site for one in writes} == {written}
    return tuple(Place(read, writes[number:]) for number, read in enumerate(reads)) if in_order and is_known else None


def check_places(places: Sequence[tuple[str, Place]], num_layers: int) -> None:
    """Raise GranaryError where two dictionaries stand in for one output, or one for a layer that the model lacks."""
    taken: dict[HookPoint, str] = {}
    for name, place in places:
        if place.writes[-1].layer >= num_layers:
            raise GranaryError(
                f"{name} stands in for layer {place.writes[-1].layer}, and the model has {num_layers} layers"
            )
        if place.own in taken:
            raise GranaryError(f"{taken[place.own]} and {name} both write {place.own}: give one")
        taken[place.own] = name
