"""The cross-layer transcoder, CLT (Ameisen et al. 2025): latents of each layer that write there and at all later ones.

    f_l = activation(W_enc,l x~_l + b_enc,l);   y^_t = denormalise(sum over l <= t of f_l W_dec,l,t + b_dec,t)

Layer l of L reads the l-th site, such as the MLP's input, and writes the l-th to the last site of the other list, such
as the MLPs' outputs. A latent's decoder row is the concatenation over those, [F, (L - l) D], and has unit norm as a
whole. Latents are numbered layer after layer: latent i of layer l is number l F + i. ``tied`` has tied decoders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.groups import LatentGroup, random_unit_rows
from shared.sae.latents import SparseLatents
from shared.sae.roles import Role
from shared.sae.sites import SiteWidths
from shared.sae.variants.base import Dictionary, Picks
from shared.sae.variants.tied import TYINGS, PerSource, PerTarget, TargetDecoders, TiedGroup

SCOPES = ("all", "layer")
ACTIVATIONS = ("topk", "batchtopk", "relu", "jumprelu")


@dataclass(frozen=True, kw_only=True)
class CLTConfig(DictionaryConfig):
    """A cross-layer transcoder."""

    kind: ClassVar[str] = "clt"
    width_fields: ClassVar[tuple[str, ...]] = ("read_widths", "write_widths")

    read_widths: tuple[int, ...]
    """Of each site that is read, one per layer."""
    write_widths: tuple[int, ...]
    """Of each site that is written, one per layer."""
    k_scope: str = "all"
    """Over what k latents per token are chosen: over all layers together (all), or in each (layer)."""
    tying: str = "none"
    """Fewer decoders than pairs of layers: each latent has one direction and a share for each target (per_source), or
    the latents i of all layers share their row at each target (per_target)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = len(self.read_widths)
        if len(self.write_widths) != layers:
            raise GranaryError(
                f"a clt reads one site per layer and writes as many, not {layers} and {len(self.write_widths)}: give "
                "reads and writes alike, in the order of the layers"
            )
        if self.k_scope not in SCOPES:
            raise GranaryError(f"variant.k_scope={self.k_scope!r}: choose from {', '.join(SCOPES)}")
        if self.tying not in TYINGS:
            raise GranaryError(f"variant.tying={self.tying!r}: choose from {', '.join(TYINGS)}")
        if self.tying == "per_source" and len(set(self.write_widths)) > 1:
            raise GranaryError(
                f"variant.tying=per_source has one direction per latent for sites of one width, not "
                f"{sorted(set(self.write_widths))}: use per_target or none"
            )
        if self.activation not in ACTIVATIONS:
            raise GranaryError(f"sae.activation={self.activation} of a clt: choose from {', '.join(ACTIVATIONS)}")
        if self.d_latent % layers:
            raise GranaryError(
                f"{self.d_latent} latents do not divide among the {layers} layers of a clt: change sae.expansion"
            )
        if self.k is not None and self.k_scope == "layer" and self.k > self.per_layer:
            raise GranaryError(f"sae.k={self.k} is more than the {self.per_layer} latents of a layer: lower it")

    @property
    def num_groups(self) -> int:
        """Layers."""
        return len(self.read_widths)

    @property
    def per_layer(self) -> int:
        """Latents of each layer."""
        return self.d_latent // len(self.read_widths)

    @property
    def widths(self) -> SiteWidths:
        """Widths of as many sites on each side as layers."""
        return SiteWidths(self.read_widths, self.write_widths)

    @property
    def is_autoencoder(self) -> bool:
        """What a layer writes is more than what it reads."""
        return False

    @property
    def follows_depth(self) -> bool:
        """But for the k largest of all layers of each token: there a later layer decides what an earlier fires."""
        return not (self.activation == "topk" and self.k_scope == "all")

    @classmethod
    def from_widths(cls, widths: SiteWidths) -> dict[str, Any]:
        """Make a config of as many sites on each side."""
        return {"read_widths": widths.reads, "write_widths": widths.writes}


class CLT(Dictionary):
    """A cross-layer transcoder as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = CLTConfig
    config: CLTConfig
    layers: nn.Module
    """Holds the groups by their numbers."""

    def __init__(
        self,
        config: DictionaryConfig,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
        held: range | None = None,
    ) -> None:
        """`held`: all latents, or None: its layers are not cut."""
        super().__init__(config, kernels=kernels, compute_dtype=compute_dtype)
        assert held in (None, range(config.d_latent))
        if self.config.tying == "per_target":
            self.targets = TargetDecoders(self.config.per_layer, self.widths.writes)
            if not self.targets.W[0].is_meta:
                self.targets.draw(generator)
        self.layers = nn.ModuleList(self._make_layer(number, generator) for number in range(config.num_groups))
        self.b_dec = nn.Parameter(torch.zeros(self.widths.d_out))
        self.make_normalisation()

    def sizes(self) -> list[tuple[int, int]]:
        """Widths that each layer reads and writes."""
        whole = self.config.widths
        written = list(accumulate(reversed(whole.writes)))[::-1]
        return list(zip(whole.reads, written, strict=True))

    def _make_layer(self, number: int, generator: torch.Generator | None) -> LatentGroup:
        layer = LatentGroup(self.choice)
        if self.config.tying == "per_source":
            layer = PerSource(self.choice, self.config.num_groups - number)
        elif self.config.tying == "per_target":
            layer = PerTarget(self.choice, self.targets, number)
        layer.make_matrices(*self.sizes()[number], self.config.per_layer)
        layer.make_activation(self.config, self.config.per_layer)
        if not layer.W_enc.is_meta:
            if isinstance(layer, TiedGroup):
                layer.draw(generator)
            else:
                random_unit_rows(layer.W_dec, generator)
                random_unit_rows(layer.W_enc, generator)
        return layer

    @property
    def groups(self) -> tuple[LatentGroup, ...]:
        """The layers."""
        return tuple(layer for layer in self.layers.children() if isinstance(layer, LatentGroup))

    @property
    def places(self) -> tuple[tuple[slice, slice], ...]:
        """Each layer reads its own site and writes that of its own number and all later ones."""
        starts = [0, *accumulate(self.widths.reads)]
        written = [0, *accumulate(self.widths.writes)]
        return tuple(
            (slice(starts[layer], starts[layer + 1]), slice(written[layer], self.widths.d_out))
            for layer in range(self.config.num_groups)
        )

    def roles(self) -> dict[str, Role]:
        """Those of each layer, and of what all dictionaries have."""
        unit = self.config.unit_norm_decoder
        own = {
            f"layers.{number}.{name}": role
            for number, layer in enumerate(self.groups)
            for name, role in layer.group_roles(unit_norm_decoder=unit).items()
        }
        if self.config.tying == "per_target":
            own |= {f"targets.{name}": role for name, role in self.targets.roles(unit_norm_decoder=unit).items()}
        return {**own, **super().roles()}

    def start_decoders(self, rows: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        """Tied ones get what is nearest to that."""
        if self.config.tying == "none":
            super().start_decoders(rows, norms)
        elif self.config.tying == "per_target":
            self.targets.start(rows)
        else:
            for layer, rows_FD in zip(self.groups, rows, strict=True):
                assert isinstance(layer, PerSource)
                layer.start(rows_FD)

    def untied(self) -> dict[str, Tensor]:
        """``state_dict`` with every layer's W_dec, as those have it whose decoders are not tied."""
        whole = {f"layers.{number}.W_dec": layer.W_dec.detach() for number, layer in enumerate(self.groups)}
        return {**self.state_dict(), **whole}

    def fire(self, centred_ND: Tensor) -> Picks:
        """Inference, of what the encoders multiply, side by side: each layer by itself, or the k largest of all."""
        found = [
            layer.fire(centred_ND[:, reads].contiguous())
            for layer, (reads, _) in zip(self.groups, self.places, strict=True)
        ]
        if not self.config.follows_depth:
            assert self.config.k is not None
            found = largest(found, self.config.k)
        return self.join(found)

    def join(self, picks: list[Picks]) -> Picks:
        """Picks of each layer, by the layer's own numbers, as those of the dictionary, [N, sum of K]."""
        shifted = [
            torch.where(indices_NK < 0, -1, indices_NK + number * self.config.per_layer)
            for number, (_, indices_NK) in enumerate(picks)
        ]
        return torch.cat([values_NK for values_NK, _ in picks], 1), torch.cat(shifted, 1)

    def split(self, values_NK: Tensor, indices_NK: Tensor) -> list[Picks]:
        """Picks of the dictionary as those of each layer by its own numbers, as many slots as its fullest token has."""
        found = []
        owner_NK = torch.where(indices_NK < 0, -1, indices_NK // self.config.per_layer)
        for number in range(self.config.num_groups):
            mine_NK = owner_NK == number
            width = max(1, int(mine_NK.sum(1).max())) if len(mine_NK) else 1
            places_NW = mine_NK.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
            kept_NW = mine_NK.gather(1, places_NW)
            own_NW = indices_NK.gather(1, places_NW) - number * self.config.per_layer
            found.append((values_NK.gather(1, places_NW) * kept_NW, torch.where(kept_NW, own_NW, -1)))
        return found

    def decoded(self, values_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Sum over layers, without b_dec, [N, D_out]."""
        y_ND = values_NK.new_zeros(len(values_NK), self.widths.d_out)
        for layer, (_, writes), picks in zip(self.groups, self.places, self.split(values_NK, indices_NK), strict=True):
            y_ND[:, writes] += layer.written(*picks)
        return y_ND

    @torch.no_grad()
    def encode(self, x: Tensor, *, return_all_features: bool = False) -> SparseLatents:
        """Active latents of the reads side by side, x [..., D_in]; slots lie layer after layer. No gradient.

        What a token gets does not depend on the others, and what a layer fires on its own site alone, but for topk
        with ``k_scope=all``, which takes the k largest of all layers.
        """
        normal, _, _ = self.normalise(x)
        normal_ND = normal.reshape(-1, self.widths.d_in)
        values, indices = self.fire(normal_ND)
        shape, features = (*x.shape[:-1], values.shape[-1]), None
        if return_all_features:
            parts = [
                torch.relu(normal_ND[:, reads] @ layer.W_enc.T + layer.b_enc)
                for layer, (reads, _) in zip(self.groups, self.places, strict=True)
            ]
            features = torch.cat(parts, 1).view(*x.shape[:-1], -1)
        return SparseLatents(values.view(shape), indices.view(shape), all_features=features)

    @torch.no_grad()
    def decode(self, latents: SparseLatents) -> Tensor:
        """Reconstruction of the writes side by side, [..., D_out]. No gradient."""
        width = latents.values.shape[-1]
        y_ND = self.decoded(latents.values.reshape(-1, width).to(self.b_dec.dtype), latents.indices.reshape(-1, width))
        return self.denormalise((y_ND + self.b_dec).view(*latents.values.shape[:-1], self.widths.d_out))


def largest(picks: list[Picks], k: int) -> list[Picks]:
    """Keep each token's k largest values of picks of several groups; at a tie the first group has precedence."""
    values_NC = torch.cat([values_NK for values_NK, _ in picks], 1)
    places_NK = values_NC.topk(min(k, values_NC.shape[1]), dim=1).indices
    kept_NC = torch.zeros_like(values_NC, dtype=torch.bool).scatter_(1, places_NK, True)
    found = []
    for (values_NK, indices_NK), kept_NK in zip(
        picks, kept_NC.split([values_NK.shape[1] for values_NK, _ in picks], 1), strict=True
    ):
        kept_NK = kept_NK & (indices_NK >= 0)
        width = max(1, int(kept_NK.sum(1).max()))  # values descend: what is kept comes first
        indices_NK = indices_NK.masked_fill(~kept_NK, -1)[:, :width]
        found.append((values_NK[:, :width] * kept_NK[:, :width], indices_NK))
    return found
