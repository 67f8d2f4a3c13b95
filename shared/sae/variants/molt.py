"""The mixture of linear transforms, MoLT (Anthropic, July 2025): a transcoder whose latents are maps of low rank.

    f = activation(W_enc x~ + b_enc);   y^ = denormalise(sum_i f_i U_i V_i x~ + b_dec)

A latent says when its transform is on and how strongly, not what to write: that depends on x~. V_i is [r, D_in] and U_i
[D_out, r], the rank r is the transform's own. Their rows, and U's columns, of all transforms lie below one another in V
[R, D_in] and U [R, D_out], R the sum of ranks; no map [D_out, D_in] is ever written out. With ``unit_norm_decoder``
every transform has Frobenius norm 1 after each step, so that f_i alone says how strong it is:

    |U V|^2 = sum((U^T U) * (V V^T)),   two [r, r] products

Under normalisation=centre_scale U_i V_i is linear in what differs from the mean, so that in raw activations there is a
constant row f_i U_i V_i mean beside it: it lies in the mean that is saved. Under scale and none the maps are linear.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from shared.basics.documents import shortened
from shared.basics.errors import GranaryError
from shared.kernels import PairGradient, PairOrder, Ranks, product, transform_decode
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.latents import SparseLatents
from shared.sae.roles import Role
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants.one_group import OneGroup
from shared.sae.variants.transcoder import TranscoderConfig

EXAMPLE = "variant.ranks={16:1,8:2,4:4}"
# Of a rank, or of a number of transforms: a file may say anything.
MOST_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class MoLTConfig(TranscoderConfig):
    """A mixture of linear transforms from one site to one site."""

    kind: ClassVar[str] = "molt"

    ranks: dict[str, int]
    """How many transforms there are of each rank: ``{"512": 1, "256": 2}``. d_latent is their sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", read_ranks(self.ranks))
        if sum(self.ranks.values()) != self.d_latent:
            raise GranaryError(
                f"variant.ranks={shown(self.ranks)} are {sum(self.ranks.values())} transforms, sae.d_latent says "
                f"{self.d_latent}: leave it and sae.expansion null"
            )
        highest, most = max(map(int, self.ranks)), min(self.d_in, self.d_out)
        if highest > most:
            raise GranaryError(
                f"variant.ranks={shown(self.ranks)}: no map from {self.d_in} features to {self.d_out} has a rank of "
                f"{highest}: give ranks up to {most}"
            )
        if self.is_autoencoder:
            raise GranaryError(f"a molt of {self.sites} to itself would learn to copy it: use variant=sae")

    @property
    def writes_rows(self) -> bool:
        """What a latent adds is its map of what was read."""
        return False

    @property
    def decoder_rows(self) -> int:
        """The sum of ranks."""
        return sum(int(rank) * count for rank, count in self.ranks.items())

    @property
    def blocks(self) -> int:
        """Equal parts in which the transforms lie one after another: as many as divide every rank's count."""
        return math.gcd(*self.ranks.values())

    @property
    def rank_of_each(self) -> tuple[int, ...]:
        """The rank of every latent: block by block, the highest rank of each block first."""
        block = [int(rank) for rank, count in self.ranks.items() for _ in range(count // self.blocks)]
        return tuple(block * self.blocks)

    def check_parts(self, parts: int) -> None:
        """Every part has as many transforms of each rank. Raises GranaryError where that can't be."""
        for rank, count in self.ranks.items():
            if count % parts:
                raise GranaryError(
                    f"the {count} transforms of rank {rank} do not divide among parallel.latent={parts}: change "
                    "variant.ranks, or use parallel=ddp"
                )

    @classmethod
    def latents_of(cls, structure: Mapping[str, Any]) -> int | None:
        """The sum of all counts."""
        return sum(read_ranks(structure.get("ranks")).values())

    @classmethod
    def of(cls, widths: SiteWidths, fields: Mapping[str, Any], sites: Sites | None = None) -> Self:
        """Ranks may be whole numbers, as a command line gives them."""
        return super().of(widths, {**fields, "ranks": read_ranks(fields.get("ranks"))}, sites)


def read_ranks(given: object) -> dict[str, int]:
    """Counts by rank, the highest rank first, from ``{16: 1, 8: 2}`` or its text; raises GranaryError otherwise."""
    if given is None or given == {}:
        raise GranaryError(f"a molt needs its transforms, how many of each rank: give {EXAMPLE}")
    text = given if isinstance(given, str) else shown(given) if isinstance(given, Mapping) else ""
    entries = [entry.split(":") for entry in text.strip().removeprefix("{").removesuffix("}").split(",")]
    found: dict[int, int] = {}
    for entry in entries:
        numbers = [int(part) if part.strip().isdecimal() and len(part) < MOST_DIGITS else 0 for part in entry]
        if len(numbers) != 2 or 0 in numbers or numbers[0] in found:
            raise GranaryError(
                f"variant.ranks={shortened(given)}: a number of transforms for each rank, whole numbers from 1 on, and "
                f"every rank once, such as {EXAMPLE}"
            )
        found[numbers[0]] = numbers[1]
    return {str(rank): found[rank] for rank in sorted(found, reverse=True)}


def shown(ranks: Mapping[Any, Any]) -> str:
    """Return ranks as they are written on a command line."""
    return "{" + ",".join(f"{rank}:{count}" for rank, count in ranks.items()) + "}"


class MoLT(OneGroup):
    """A MoLT as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = MoLTConfig
    config: MoLTConfig
    writes_rows: ClassVar[bool] = False
    is_two_rows: ClassVar[bool] = False

    V: nn.Parameter
    U: nn.Parameter

    def make_held(self, held: range) -> None:
        """The encoder, and both factors of every transform."""
        self.ranks = Ranks(self.config.rank_of_each[held.start : held.stop])
        """Of the transforms held here."""
        self.make_encoder(self.widths.d_in, len(held))
        self.V = nn.Parameter(torch.empty(self.ranks.total, self.widths.d_in))
        self.U = nn.Parameter(torch.empty(self.ranks.total, self.widths.d_out))

    def draw(self, held: range, generator: torch.Generator | None) -> None:
        """Factors with orthonormal rows, scaled to norm 1 together; the bits of those held here are those of all."""
        self.draw_rows(self.W_enc, held, generator)
        spans = dict(zip(held, self.ranks.spans(), strict=True))
        device = None if generator is None else generator.device
        with torch.no_grad():
            for latent, rank in enumerate(self.config.rank_of_each):
                for factor, width in ((self.V, self.widths.d_in), (self.U, self.widths.d_out)):
                    drawn = torch.empty(width, rank, device=device).normal_(generator=generator)
                    if latent in spans:
                        factor[slice(*spans[latent])] = torch.linalg.qr(drawn).Q.T
            self.to_unit_norm()

    def transform_norms(self) -> Tensor:
        """Frobenius norm of each ``U_i V_i``, [F], with gradient."""
        squares = []
        for rank, rows in self.ranks.runs():
            V_CrD, U_CrE = self.V[rows].unflatten(0, (-1, rank)), self.U[rows].unflatten(0, (-1, rank))
            squares.append(((U_CrE @ U_CrE.mT) * (V_CrD @ V_CrD.mT)).sum((1, 2)))
        return torch.cat(squares).clamp_min(1e-30).sqrt()

    @torch.no_grad()
    def to_unit_norm(self) -> None:
        """Divide every U_i by the norm of its transform."""
        self.U.div_(self.ranks.spread(self.transform_norms())[:, None])

    def after_step(self) -> None:
        """Norms stay 1, unless the config frees them."""
        if self.has_unit_rows:
            self.to_unit_norm()

    def decoder_norm(self) -> Tensor | None:
        """Norms of the transforms; None where they are 1."""
        return None if self.has_unit_rows else self.transform_norms()

    # What it writes

    def write(
        self,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None = None,
        *,
        read: Given | None = None,
    ) -> Tensor:
        """What picks decode to, [N, D_out], with gradients for the values and both factors."""
        assert isinstance(read, Tensor)
        return transform_decode(values_NK, indices_NK, read, self.V, self.U, order, self.ranks, compute=self.compute)

    def write_all(self, f_NF: Tensor, read: Given, *, frozen: bool = False) -> Tensor:
        """The same of every transform, by two products of the sum of ranks; `frozen`: no gradient for the factors."""
        assert isinstance(read, Tensor)
        V_RD, U_RE = (self.V.detach(), self.U.detach()) if frozen else (self.V, self.U)
        h_NR = product(read, V_RD.T, compute=self.compute)
        return product(self.ranks.spread(f_NF) * h_NR, U_RE, compute=self.compute)

    def write_some(self, f_NR: Tensor, latents_R: Tensor, read: Given) -> Tensor:
        """``write_all`` of some latents, which are distinct."""
        assert isinstance(read, Tensor)
        is_one_F = torch.zeros(self.num_latents, dtype=torch.bool, device=f_NR.device).index_fill_(0, latents_R, True)
        rows = self.ranks.spread(is_one_F).nonzero().squeeze(1)
        place_F = torch.zeros(self.num_latents, dtype=torch.int64, device=f_NR.device)
        place_F[latents_R] = torch.arange(len(latents_R), device=f_NR.device)
        h_Nr = product(read, self.V.index_select(0, rows).T, compute=self.compute)
        f_Nr = f_NR.index_select(1, self.ranks.spread(place_F)[rows])
        return product(f_Nr * h_Nr, self.U.index_select(0, rows), compute=self.compute)

    @torch.no_grad()
    def written(self, values_NK: Tensor, indices_NK: Tensor, *, read: Given | None = None) -> Tensor:
        """What picks decode to, without gradient."""
        return self.write(values_NK, indices_NK, PairOrder(indices_NK, self.num_latents), read=read)

    @torch.no_grad()
    def decode(self, latents: SparseLatents) -> Tensor:
        """Reconstruction; raises GranaryError for latents without what their tokens read, as ``encode`` gives it."""
        if latents.read is None:
            raise GranaryError("a molt's latents are maps of what was read, which encode returns in .read: keep it")
        return super().decode(latents)

    def group_roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """Both factors learn at the decoder's rate; their rows lie transform by transform."""
        roles = super().group_roles(unit_norm_decoder=unit_norm_decoder)
        del roles["W_dec"]
        factor = Role(latent_axis=0, rate="decoder")
        return {**roles, "V": factor, "U": factor}
