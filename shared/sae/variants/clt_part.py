"""What one process holds of a cross-layer transcoder whose layers are dealt among several.

A process owns some layers l: the encoders of what they read, and of every decoder the columns that they write. So the
decoder row of a latent lies in pieces on the owners of its targets, and y^_t is added up where t is owned. A layer may
have several owners: each has an equal share of its latents' encoders, and of the columns of what it writes.

Shapes: L layers, F latents of a layer, D_t width of the t-th written site.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.groups import LatentGroup, draw_share, unit_blocks
from shared.sae.roles import Role
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants.base import Dictionary, Picks
from shared.sae.variants.clt import CLT, CLTConfig


@dataclass(frozen=True)
class LayerShare:
    """Which layers a process owns, ascending, and which of `parts` equal shares of each."""

    layers: tuple[int, ...]
    part: int = 0
    parts: int = 1

    def sites(self, sites: Sites) -> Sites:
        """Return those of a whole CLT's that the process reads and must produce."""
        reads, writes = ([side[layer] for layer in self.layers] for side in (sites.reads, sites.writes))
        return Sites(tuple(reads), tuple(writes), sites.unit)

    def span(self, count: int) -> tuple[int, int]:
        """First and number of the process's share of `count` things."""
        size = count // self.parts
        return self.part * size, size


def deal_layers(layers: int, owners: int) -> list[tuple[int, ...]]:
    """The layers of each of `owners`, dealt there and back from the last on: two get l and L - 1 - l, whose decoders
    are L + 1 together whatever l is. Raises GranaryError for more owners than layers."""
    if owners > layers:
        raise GranaryError(
            f"{layers} layers can't be dealt among {owners} owners: give parallel.latent=..., so that the owners of a "
            "layer share its latents"
        )
    hands: list[list[int]] = [[] for _ in range(owners)]
    for number, layer in enumerate(reversed(range(layers))):
        turn, place = divmod(number, owners)
        hands[place if turn % 2 == 0 else owners - 1 - place].append(layer)
    return [tuple(sorted(hand)) for hand in hands]


def shares_of(layers: int, ranks: int, parts: int) -> list[LayerShare]:
    """Return every rank's; `parts` ranks, one after the other, own the same layers."""
    hands = deal_layers(layers, ranks // parts)
    return [LayerShare(hand, part, parts) for hand in hands for part in range(parts)]


@dataclass(frozen=True)
class Cut:
    """Which pieces of a tensor of the whole are here, side by side along one axis."""

    shape: tuple[int, ...]
    """Of the whole."""
    axis: int
    spans: tuple[tuple[int, int], ...]
    """First place in the whole, and length, of each piece."""


class PartDecoder(nn.Module):
    """The columns that are written here of the decoder of a layer that another process encodes."""

    def __init__(self, num_latents: int, d_out: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_out))


class CLTPart(CLT):
    """A process's part: ``groups`` are the layers it owns, with its share of their latents; ``decoders`` are of all
    layers that write where it writes."""

    def __init__(
        self,
        config: DictionaryConfig,
        share: LayerShare,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        """First weights are those of the whole with the same `generator`. Raises GranaryError for what can't be cut."""
        Dictionary.__init__(self, config, kernels=kernels, compute_dtype=compute_dtype)
        assert isinstance(config, CLTConfig)
        if config.tying != "none":
            raise GranaryError(
                f"variant.tying={config.tying} with parallel=layers: tied decoders are of several targets at once, "
                "which have other owners; use ddp or fsdp"
            )
        self.share = share
        for what, counts in (("latents of a layer", (config.per_layer,)), ("columns of a site", config.write_widths)):
            for count in counts:
                if count % share.parts:
                    raise GranaryError(f"{count} {what} do not divide among parallel.latent={share.parts}")
        self.layers = nn.ModuleDict({str(layer): self._make(layer) for layer in range(share.layers[-1] + 1)})
        self.b_dec = nn.Parameter(torch.zeros(sum(self.columns)))
        self.make_normalisation()
        if not self.b_dec.is_meta:
            self._draw(generator)

    @property
    def columns(self) -> list[int]:
        """How many columns of each written site are here."""
        return [self.share.span(width)[1] for width in self.widths.writes]

    def _first_target(self, layer: int) -> int:
        """Of the written sites, the first that a layer writes."""
        return next(number for number, owned in enumerate(self.share.layers) if owned >= layer)

    def _make(self, layer: int) -> nn.Module:
        per_layer, d_out = self.config.per_layer, sum(self.columns[self._first_target(layer) :])
        if layer not in self.share.layers:
            return PartDecoder(per_layer, d_out)
        group, rows = LatentGroup(self.choice), self.share.span(per_layer)[1]
        group.make_matrices(self.config.read_widths[layer], d_out, rows)
        group.W_dec = nn.Parameter(torch.empty(per_layer, d_out))
        group.make_activation(self.config, rows)
        return group

    def make_normalisation(self) -> None:
        """One scale for each site, also where one is here: it is a piece of those of all."""
        super().make_normalisation()
        if self.config.num_groups > 1:
            for side, sites in (("input", self.widths.reads), ("output", self.widths.writes)):
                self.register_buffer(f"{side}_scale", torch.ones(len(sites)))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        """Every row of the whole is drawn, in its order, and what is held here is kept."""
        first, _ = self.share.span(self.config.per_layer)
        cuts = self.cuts()
        for layer, (d_in, d_out) in enumerate(self.sizes()):
            held = self.layers.get_submodule(str(layer)) if layer <= self.share.layers[-1] else None
            for start, block in unit_blocks(self.config.per_layer, d_out, generator):
                if held is not None:
                    pieces = [block.narrow(1, *span) for span in cuts[f"layers.{layer}.W_dec"].spans]
                    held.get_parameter("W_dec")[start : start + len(block)] = torch.cat(pieces, 1)
            own_FD = held.W_enc if isinstance(held, LatentGroup) else self.b_dec.new_empty(0, d_in)
            draw_share(own_FD, first, self.config.per_layer, generator)

    @property
    def groups(self) -> tuple[LatentGroup, ...]:
        """The layers owned here."""
        return tuple(layer for layer in self.layers.children() if isinstance(layer, LatentGroup))

    @property
    def decoders(self) -> list[tuple[nn.Parameter, slice]]:
        """W_dec of every layer that writes here, from layer 0 on, and its columns of what is written here."""
        starts = [0, *accumulate(self.columns)]
        return [
            (module.get_parameter("W_dec"), slice(starts[self._first_target(int(layer))], starts[-1]))
            for layer, module in self.layers.named_children()
        ]

    @property
    def widths(self) -> SiteWidths:
        """Widths of the sites that are read and written here."""
        whole, layers = self.config.widths, self.share.layers
        return SiteWidths(tuple(whole.reads[layer] for layer in layers), tuple(whole.writes[layer] for layer in layers))

    @property
    def places(self) -> tuple[tuple[slice, slice], ...]:
        """What each layer owned here reads of what is read here, and writes of what is written here."""
        starts = [0, *accumulate(self.widths.reads)]
        decoders = self.decoders
        return tuple(
            (slice(start, end), decoders[layer][1])
            for layer, start, end in zip(self.share.layers, starts, starts[1:], strict=False)
        )

    @property
    def num_latents(self) -> int:
        """Encoded here."""
        return sum(group.num_latents for group in self.groups)

    def own_columns(self, y: Tensor) -> Tensor:
        """Return the columns that are written here of whole written sites side by side, [..., sum of widths]."""
        if self.share.parts == 1:
            return y
        parts = y.split(self.widths.writes, -1)
        return torch.cat([part.narrow(-1, *self.share.span(part.shape[-1])) for part in parts], -1)

    def roles(self) -> dict[str, Role]:
        """Return the whole's, for what is here."""
        held, unit = self.state_dict().keys(), self.config.unit_norm_decoder
        shared = LatentGroup.group_roles(self.groups[0], unit_norm_decoder=unit)
        own = {
            f"layers.{layer}.{name}": role for layer, _ in self.layers.named_children() for name, role in shared.items()
        }
        return {name: role for name, role in {**own, **Dictionary.roles(self)}.items() if name in held}

    def cuts(self) -> dict[str, Cut]:
        """Return which pieces of the whole are here. What is not named is here as it is."""
        whole, per_layer, part = self.config.widths, self.config.per_layer, self.share.span
        found = {}
        starts = {side: [0, *accumulate(sites)] for side, sites in (("in", whole.reads), ("out", whole.writes))}
        own = [(starts["out"][layer] + part(width)[0], part(width)[1]) for layer, width in enumerate(whole.writes)]
        for layer, (d_in, d_out) in enumerate(self.sizes()[: self.share.layers[-1] + 1]):
            targets = tuple((own[t][0] - starts["out"][layer], own[t][1]) for t in self.share.layers if t >= layer)
            found[f"layers.{layer}.W_dec"] = Cut((per_layer, d_out), 1, targets)
            rows = (part(per_layer),)
            found[f"layers.{layer}.W_enc"] = Cut((per_layer, d_in), 0, rows)
            found |= {f"layers.{layer}.{name}": Cut((per_layer,), 0, rows) for name in ROWS}
        found["b_dec"] = Cut((whole.d_out,), 0, tuple(own[layer] for layer in self.share.layers))
        for side, key, sites in (("input", "in", whole.reads), ("output", "out", whole.writes)):
            spans = tuple((starts[key][layer], sites[layer]) for layer in self.share.layers)
            found |= {f"{side}_{name}": Cut((sum(sites),), 0, spans) for name in ("mean", "variance")}
            if len(sites) > 1:
                found[f"{side}_scale"] = Cut((len(sites),), 0, tuple((layer, 1) for layer in self.share.layers))
        return found

    def latent_cut(self) -> Cut:
        """Return that of a vector with an entry for each latent of the whole."""
        first, rows = self.share.span(self.config.per_layer)
        spans = tuple((layer * self.config.per_layer + first, rows) for layer in self.share.layers)
        return Cut((self.config.d_latent,), 0, spans)

    def fire(self, centred_ND: Tensor) -> Picks:
        """What a layer decodes here another one may have encoded: the losses let them meet."""
        raise NotImplementedError


ROWS = ("b_enc", "activation.log_threshold")
"""Vectors of a layer with an entry per latent."""
