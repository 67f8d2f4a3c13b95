"""Layer parallel: the layers of a cross-layer transcoder dealt among the ranks.

A rank owns layers, see ``shared.sae.variants.clt_part``: it reads only what they read and write from the store, and
every rank sees the same tokens there. Messages are picks (which latents fire, how strongly, and the gradients of that),
counts, and norms of rows; never activations. With ``parallel.latent`` as many ranks share each layer.
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.inputs import Losses, StepInputs
from shared.sae.learn.layer_ranks import LayerRanks
from shared.sae.learn.objective import Objective
from shared.sae.optim import OPTIMISERS, Optimiser, OptimiserConfig, RowShare, make_optimiser
from shared.sae.sites import Sites
from shared.sae.variants.clt import CLTConfig
from shared.sae.variants.clt_part import CLTPart, LayerShare, shares_of
from stage_train.config import OnDamage, TrainSchema
from stage_train.state.pieces import Pieces
from stage_train.step.layouts.base import Layout, Making, give_memory, gradients, joint_norm, of_owner

# Newer versions of torch have other names for them.
gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
sum_and_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(LayerRanks):
    """What processes that own layers of one CLT exchange, by torch.distributed."""

    def __init__(
        self, shares: Sequence[LayerShare], rank: int, per_layer: int, layer_group: dist.ProcessGroup | None
    ) -> None:
        """`layer_group`: the ranks that own the same layers; None: this one alone."""
        super().__init__(shares, rank, per_layer)
        self._layer_group = layer_group

    def gather(self, mine: Tensor) -> Tensor:
        return _gather(mine, len(self.shares), None)

    def sum_to_owners(self, parts: Tensor) -> Tensor:
        parts = parts.contiguous()
        own = torch.empty_like(parts[0])
        sum_and_scatter(own.view(-1), parts.view(-1))
        return own

    def sum(self, tensor: Tensor) -> None:
        all_reduce_sum(tensor)

    def sum_in_layer(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._layer_group)

    def gather_in_layer(self, mine: Tensor) -> Tensor:
        return _gather(mine, self.own.parts, self._layer_group)


def _gather(mine: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    mine = mine.contiguous()
    everyone = mine.new_empty(size, *mine.shape)
    gather_tensor(everyone.view(-1), mine.view(-1), group=group)
    return everyone


class LayerParallel(Layout):
    """Owners of layers x shares of each layer."""

    def __init__(self, world: World, parts: int) -> None:
        """`parts` ranks, one after the other, own the same layers."""
        super().__init__(world)
        self.parts, self._layer_group = parts, None
        if parts > 1:
            for first in range(0, world.size, parts):
                group = dist.new_group(list(range(first, first + parts)))
                if first <= world.rank < first + parts:
                    self._layer_group = group

    @property
    def stream_rank(self) -> int:
        """Every rank reads all rows, of its sites."""
        return 0

    @property
    def stream_world(self) -> int:
        """The number of shares of the rows: one."""
        return 1

    def shares(self, num_layers: int) -> list[LayerShare]:
        """Return the shares of all ranks."""
        return shares_of(num_layers, self.world.size, self.parts)

    def sites(self, sites: Sites) -> Sites:
        """Those of the rank's layers."""
        return self.shares(len(sites.reads))[self.world.rank].sites(sites)

    def check(self, config: DictionaryConfig, cfg: TrainSchema) -> None:
        """Raises GranaryError for what has no layers, and for what needs all sites, or whole rows, in one place."""
        if not isinstance(config, CLTConfig):
            raise GranaryError(f"parallel=layers deals the layers of a clt, not a {config.kind}: use ddp, fsdp, latent")
        with torch.device("meta"):
            CLTPart(config, self.shares(config.num_groups)[0])
        if not OPTIMISERS[cfg.optim.kind.value].by_element:
            raise GranaryError(
                f"optim.kind={cfg.optim.kind.value} needs whole decoder rows, which parallel=layers cuts: use adam or "
                "signum"
            )
        if cfg.optim.lazy:
            raise GranaryError("optim.lazy=true needs whole decoder rows, which parallel=layers cuts: set it to false")
        if cfg.init_from is not None:
            raise GranaryError("init_from with parallel=layers: a rank begins with its own part, from data; use ddp")
        if cfg.stream.on_damage is OnDamage.skip:
            raise GranaryError(
                "stream.on_damage=skip with parallel=layers: a rank does not see what is damaged at the sites of "
                "others; use stop"
            )

    def begins_in_parts(self, config: DictionaryConfig) -> bool:
        """Whether each rank makes its part alone: it always does."""
        return True

    def num_latents(self, config: DictionaryConfig) -> int:
        """Return how many the rank computes: its share of its layers' latents."""
        share = self.shares(config.num_groups)[self.world.rank]
        return len(share.layers) * (config.d_latent // config.num_groups // self.parts)

    def own_part(self, config: DictionaryConfig, learning: LearningConfig, **how: Unpack[Making]) -> Objective:
        """Its layers and what it writes."""
        shares = self.shares(config.num_groups)
        share = shares[self.world.rank]
        part = CLTPart(config, share, **how)
        objective = Objective(part, learning)
        objective.shard = Ranks(shares, self.world.rank, part.config.per_layer, self._layer_group)
        return objective

    def distribute(self, objective: Objective, *, has_values: bool = True) -> Objective:
        """It is the rank's part as it was made."""
        give_memory(objective, self.world.device)
        return objective

    def optimiser(self, objective: Objective, config: OptimiserConfig) -> Optimiser:
        """Build that of the rank's part; what unit norm asks of a row is summed over the ranks that hold its pieces."""
        part, ranks = _part(objective), _ranks(objective)
        layers = {f"layers.{layer}.W_dec": layer for layer in range(len(part.decoders))}

        def over_columns(found: Mapping[str, Tensor]) -> None:
            sums_LF = next(iter(found.values())).new_zeros(ranks.num_layers, ranks.per_layer)
            for name, sum_F in found.items():
                sums_LF[layers[name]] = sum_F
            ranks.sum(sums_LF)
            for name, sum_F in found.items():
                sum_F.copy_(sums_LF[layers[name]])

        return make_optimiser(part, config, rows=RowShare(over_columns=over_columns))

    def losses(self, objective: Objective, x: Given, y_ND: Tensor, inputs: StepInputs) -> Losses:
        """A rank's are a part of the sum, and the metrics are means over ranks."""
        losses = super().losses(objective, x, y_ND, inputs)
        losses.metrics["loss"] = losses.total.detach()
        for name, value in losses.metrics.items():
            losses.metrics[name] = value * self.world.size
        return losses

    def reduce_gradients(self, optimiser: Optimiser) -> Tensor:
        """Every gradient is on one rank, and whole."""
        return joint_norm(gradients(optimiser), [])

    def merge_dead(self, tokens_since_fired_F: Tensor) -> None:
        """No other rank encodes the same latents."""

    def look_at_dead(self, objective: Objective, dead_now_F: Tensor, turn: int) -> Tensor:
        """Tell every rank, too, which latents of each layer are dead."""
        part, ranks = _part(objective), _ranks(objective)
        rows, own_R = part.groups[0].num_latents, super().look_at_dead(objective, dead_now_F, turn)
        mine_F = torch.zeros_like(dead_now_F, dtype=torch.uint8).index_fill_(0, own_R, 1)
        dead_RSF = ranks.gather(ranks.padded(list(mine_F.view(-1, rows)))).bool()
        ranks.dead = [
            torch.cat([dead_RSF[rank, slot] for rank, slot in ranks.homes(layer)]).nonzero().squeeze(1)
            for layer in range(ranks.num_layers)
        ]
        return own_R

    def mean_over_latents(self, held: Tensor) -> float:
        """All ranks together hold each latent once."""
        sums = torch.stack([held.sum(), held.new_tensor(held.numel())])
        all_reduce_sum(sums)
        return float(sums[0] / sums[1])

    def means_of_groups(self, objective: Objective, held: Tensor) -> list[float]:
        """Return the means of all layers, each of which some rank holds, or several share."""
        part, ranks = _part(objective), _ranks(objective)
        sums_L = held.new_zeros(ranks.num_layers)
        sums_L[list(part.share.layers)] = held.view(len(part.share.layers), -1).sum(1)
        all_reduce_sum(sums_L)
        means: list[float] = (sums_L / ranks.per_layer).tolist()
        return means

    def as_global(self, objective: Objective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pieces of the whole's tensors."""
        part = _part(objective)
        cuts, latents = part.cuts(), part.latent_cut()
        seen = {}
        for name, tensor in tensors.items():
            cut = latents if name.startswith("dead.") else of_owner(name, cuts)
            seen[name] = tensor if cut is None else Pieces(tensor, cut)
        return seen


def _part(objective: Objective) -> CLTPart:
    assert isinstance(objective.dictionary, CLTPart)
    return objective.dictionary


def _ranks(objective: Objective) -> LayerRanks:
    assert isinstance(objective.shard, LayerRanks)
    return objective.shard
