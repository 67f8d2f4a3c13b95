"""A threshold in the place of k: a topk or batchtopk dictionary becomes a jumprelu one of a given mean L0.

Thresholds are found on the half of a store's held-out contexts, L0 and FVU are told of the other half.

    one for all    t lies between the (N L0)-th largest pre-activation of N tokens, over all latents, and the next
    one each       t_i lies between the c_i-th largest pre-activation of latent i and its next, with c_i the number of
                   tokens that have i among the L0 largest: it fires as often as before

Both give L0 active latents per token on average over the N tokens. Under ``gate=sum`` the largest are those of z times
the latent's norm. Shapes: N tokens, D width, F latents, K picks, P pairs of a token and a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.basics.config import Split
from shared.basics.errors import GranaryError
from shared.kernels import encode_threshold
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.config import DictionaryConfig
from shared.sae.for_store import choose_sites
from shared.sae.sites import Sites, slices
from shared.sae.variants import VARIANTS, Dictionary
from shared.store import Store
from shared.store.ahead import read_ahead
from shared.store.choose import choose_contexts
from shared.store.statistics import Moments

# Pre-activations that are looked at at a time.
CHUNK_PAIRS = 1 << 24
# Each latent's own threshold is looked for among values above this share of the least that was picked.
MARGIN = 0.9
HIGHEST = torch.finfo(torch.float32).max / 4


@dataclass(frozen=True)
class Threshold:
    """What ``granary convert --threshold`` is told."""

    store: str
    """URL."""
    l0: float | None = None
    """Active latents per token; None: as many as the dictionary has now."""
    per_latent: bool = False
    contexts: int | None = None
    """Held-out contexts to use; None: all."""
    tell: Callable[[str], None] = lambda told: None
    """Takes one line that says what came of it."""

    def apply(self, where: str, made: Dictionary, provenance: dict[str, Any]) -> tuple[Dictionary, dict[str, Any]]:
        """The jumprelu dictionary, and its provenance with what made it; `where` names it in errors.

        Raises GranaryError for another activation, for an L0 that can't be had, and for a store that does not fit.
        """
        config = made.config
        if config.unit == "sequence":
            raise GranaryError(f"{where} is a {config.kind}, which reads whole contexts: --threshold goes by tokens")
        by = ACTIVATION_KINDS[config.activation]
        if not by.fixes_l0:
            raise GranaryError(f"{where} has {config.activation}, whose latents need no k: --threshold is for topk")
        if not by.is_learnt:
            raise GranaryError(f"{where} has {config.activation}, whose values may be negative: no threshold has them")
        if made.sites is None:
            raise GranaryError(f"{where} does not record where it reads and writes: give --reads and --writes")
        store = Store.open(self.store)
        sites = choose_sites(where, made.sites, store, None)
        chosen = choose_contexts(store, Split.heldout, self.contexts).tolist()
        found, judged = (chosen, chosen) if len(chosen) == 1 else (chosen[::2], chosen[1::2])
        l0 = own_l0(config) if self.l0 is None else self.l0
        tokens = Tokens(store, sites, found)
        find = one_each if self.per_latent else one_for_all
        thresholds = find(made, tokens, l0)
        calibrated = with_thresholds(made, thresholds)
        (before, l0_before), (after, l0_after) = quality([made, calibrated], Tokens(store, sites, judged))
        kind = "one per latent" if self.per_latent else f"{float(thresholds[0].max()):.6g}"
        self.tell(
            f"{where}: threshold {kind}, from {tokens.count:,} held-out tokens; on others L0 {l0_after:.2f} and FVU "
            f"{after:.4f}, by {config.activation} L0 {l0_before:.2f} and FVU {before:.4f}"
        )
        record = {"store": self.store, "tokens": tokens.count, "per_latent": self.per_latent, "l0": l0}
        return calibrated, {**provenance, "threshold": record}


def own_l0(config: DictionaryConfig) -> int:
    """Active latents per token of a dictionary that fixes their number."""
    assert config.k is not None
    return config.k * (config.num_groups if getattr(config, "k_scope", "all") == "layer" else 1)


class Tokens:
    """Trainable tokens of some contexts; may be gone through again."""

    def __init__(self, store: Store, sites: Sites, contexts: Sequence[int]) -> None:
        self.store, self.sites, self.contexts = store, sites, contexts
        self.mask_CT = torch.from_numpy(np.ascontiguousarray(store.mask(contexts)))
        self.count = int(self.mask_CT.sum())
        """N."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is read and what must be written, [n, D] each, a context at a time."""
        reads = read_ahead(self.store, ((context, self.sites.names) for context in self.contexts))
        for mask_T, activations in zip(self.mask_CT, reads, strict=True):
            yield self.sites.pick({name: x_TD[mask_T].float() for name, x_TD in activations.items()})

    def given(self, made: Dictionary) -> Iterator[list[Tensor]]:
        """What the encoder of each group multiplies, a few rows at a time."""
        rows = max(1, CHUNK_PAIRS // made.config.d_latent)
        for x_ND, _ in self:
            for part_ND in x_ND.split(rows):
                centred_ND = made.centred(made.normalise(part_ND)[0])
                yield [centred_ND[:, reads].contiguous() for reads, _ in made.places]


@torch.no_grad()
def one_for_all(made: Dictionary, tokens: Tokens, l0: float) -> list[Tensor]:
    """The same threshold for every latent, [F] of each group; raises GranaryError where so many never fire."""
    wanted = round(l0 * tokens.count)
    if wanted < 1:
        raise GranaryError(f"an L0 of {l0:g} over {tokens.count} tokens is less than one active latent")
    largest = Largest(wanted + 1)
    for given in tokens.given(made):
        for group, given_ND in zip(made.groups, given, strict=True):
            encoder = group.encoder()
            values_NK, indices_NK = encode_threshold(
                given_ND, encoder.W_enc, encoder.b_enc, largest.bound, compute=encoder.compute
            )
            largest.add(values_NK[indices_NK >= 0])
    values_P = largest.sorted()
    if len(values_P) < wanted:
        raise GranaryError(
            f"an L0 of {l0:g} can't be had: {len(values_P) / tokens.count:.1f} latents per token are positive"
        )
    below = float(values_P[wanted]) if len(values_P) > wanted else 0.0
    threshold = (float(values_P[wanted - 1]) + below) / 2
    thresholds = []
    for group in made.groups:
        norm_F = group.choice_norm()
        alike_F = torch.full((group.num_latents,), threshold)
        thresholds.append(alike_F if norm_F is None else alike_F / norm_F)
    return thresholds


class Largest:
    """The `count` largest of many values, in the memory of about three times as many."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.bound = 0.0
        """What a value must be above to be among them."""
        self._held: list[Tensor] = []

    def add(self, values_P: Tensor) -> None:
        """Values above the bound."""
        self._held.append(values_P)
        if sum(map(len, self._held)) > 2 * self.count:
            self._held = [self.sorted()]
            self.bound = float(self._held[0][-1])

    def sorted(self) -> Tensor:
        """Those held, at most `count`, in descending order."""
        values_P = torch.cat([torch.empty(0), *self._held])
        return values_P.topk(min(self.count, len(values_P))).values


@torch.no_grad()
def one_each(made: Dictionary, tokens: Tokens, l0: float) -> list[Tensor]:
    """A threshold for each latent, [F] of each group, at which it fires as often as among the l0 largest of a token."""
    if made.config.activation != "topk":
        raise GranaryError(f"--per-latent is for topk: {made.config.activation} fires by one threshold for all latents")
    per_k = own_l0(made.config) // (made.config.k or 1)
    if l0 < 1 or l0 % per_k:
        raise GranaryError(f"--l0 {l0:g}: for thresholds of each latent's own a multiple of {per_k}")
    choosing = remade(made, replace(made.config, k=int(l0) // per_k), made.state_dict())
    num_latents = made.config.d_latent
    count_F, least_F = torch.zeros(num_latents, dtype=torch.int64), torch.full((num_latents,), HIGHEST)
    most = 0.0
    for x_ND, _ in tokens:
        latents = choosing.encode(x_ND)
        fired_NK = latents.indices >= 0
        values_P, indices_P = latents.values[fired_NK], latents.indices[fired_NK]
        count_F += torch.bincount(indices_P, minlength=num_latents)
        least_F.scatter_reduce_(0, indices_P, values_P, "amin")
        most = max(most, float(values_P.max()))
    floor_F = torch.where(count_F > 0, least_F * MARGIN, HIGHEST)
    values_P, indices_P = above(made, tokens, floor_F)
    order_P = values_P.argsort(descending=True)
    order_P = order_P[indices_P[order_P].argsort(stable=True)]
    values_P = torch.cat([values_P[order_P], values_P.new_zeros(1)])
    held_F = torch.bincount(indices_P, minlength=num_latents)
    last_F = held_F.cumsum(0) - held_F + count_F  # the place after a latent's c-th largest
    next_F = torch.where(held_F > count_F, values_P[last_F.clamp_max(len(values_P) - 1)], floor_F)
    threshold_F = torch.where(count_F > 0, (values_P[(last_F - 1).clamp_min(0)] + next_F) / 2, most)
    return list(threshold_F.split([group.num_latents for group in made.groups]))


def above(made: Dictionary, tokens: Tokens, floor_F: Tensor) -> tuple[Tensor, Tensor]:
    """Values and latents, by their numbers in the dictionary, of all pre-activations above each latent's floor, [P]."""
    values, indices = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    floors = floor_F.split([group.num_latents for group in made.groups])
    for given in tokens.given(made):
        first = 0
        for group, given_ND, own_F in zip(made.groups, given, floors, strict=True):
            values_NK, indices_NK = encode_threshold(given_ND, group.W_enc, group.b_enc, own_F, compute=group.compute)
            kept_NK = indices_NK >= 0
            values.append(values_NK[kept_NK])
            indices.append(indices_NK[kept_NK] + first)
            first += group.num_latents
    return torch.cat(values), torch.cat(indices)


def with_thresholds(made: Dictionary, thresholds: Sequence[Tensor]) -> Dictionary:
    """The same weights, fired by these thresholds, [F] of each group."""
    config = replace(made.config, activation="jumprelu", k=None)
    state = made.state_dict()
    kept = {name: tensor for name, tensor in state.items() if ".activation." not in f".{name}"}
    prefixes = [name.removesuffix("W_enc") for name in state if name.rpartition(".")[2] == "W_enc"]
    own = {f"{prefix}activation.log_threshold": one.log() for prefix, one in zip(prefixes, thresholds, strict=True)}
    return remade(made, config, {**kept, **own})


def remade(made: Dictionary, config: DictionaryConfig, tensors: dict[str, Tensor]) -> Dictionary:
    """One of the same kind; a few names of tensors may differ."""
    return VARIANTS[config.kind].from_tensors(config, tensors, "the calibrated dictionary").requires_grad_(False)


@torch.no_grad()
def quality(dictionaries: Sequence[Dictionary], tokens: Tokens) -> list[tuple[float, float]]:
    """FVU about the mean, averaged over written sites, and mean L0 of each."""
    first = dictionaries[0]
    d_out = first.widths.d_out
    moments, fired = Moments.empty(d_out), [0] * len(dictionaries)
    error_D = [torch.zeros(d_out).double() for _ in dictionaries]
    for x_ND, y_ND in tokens:
        y_ND = y_ND.double()
        mean_D = y_ND.mean(0)
        moments.merge(len(y_ND), mean_D.numpy(), (y_ND - mean_D).square().sum(0).numpy())
        for number, one in enumerate(dictionaries):
            output = one(x_ND)
            error_D[number] += (output.x_hat.double() - y_ND).square().sum(0)
            fired[number] += int((output.latents.indices >= 0).sum())
    places = slices(first.written_sites, first.widths.writes).values()
    spread_D = torch.from_numpy(moments.m2)
    found = []
    for one_D, active in zip(error_D, fired, strict=True):
        by_site = [float(one_D[place].sum() / spread_D[place].sum()) for place in places]
        found.append((sum(by_site) / len(by_site), active / tokens.count))
    return found
