"""Latent parallel: the F latents split over ranks, on a 2-D mesh with data parallelism.

The ranks of a latent group see the same rows and hold F / L latents each, weights and moments. A token's k latents are
the k largest of the whole dictionary, exactly: every rank selects k of its own, the candidates are merged, and each
rank keeps those that are its own. Reconstructions are sums over the group. Communication is a few N x k and N x D
messages per step, none of the size of the weights.

Shape letters: N rows, D d_model, F latents held here, K picks per row, L ranks of the group, R dead latents held here.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shared.errors import GranaryError
from shared.kernels import PairOrder, encode_topk
from shared.parallel import World
from shared.sae import SAE, SAEAdam, SAEConfig, SAELosses
from stage_train.layouts.replicated import Replicated, gradients, joint_norm, sum_over

# Tensors of the SAE that every rank holds whole; all others have one row per latent.
WHOLE = frozenset({"b_dec", "input_mean", "input_scale", "input_variance"})


class _SumForward(torch.autograd.Function):
    """Sum over the group; every rank computes the same loss from the sum, so the gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    """The identity, whose gradient is summed over the group: for what every rank uses on its own latents."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_forward(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The group's sum of each rank's part, for a loss that all ranks then compute alike."""
    total: Tensor = _SumForward.apply(partial, group)  # type: ignore[no-untyped-call]
    return total


def sum_backward(shared: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A replicated tensor, for use on each rank's own latents."""
    same: Tensor = _SumBackward.apply(shared, group)  # type: ignore[no-untyped-call]
    return same


class GroupTopK(nn.Module):
    """TopK over all latents of the group, of which this rank keeps its own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def select(self, encoder: Any, centred_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and local indices [N, k]: column j is the token's j-th largest latent where held here, else -1."""
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        own = min(k, encoder.W_enc.shape[0])
        values_NK, indices_NK = encode_topk(
            centred_ND,
            encoder.W_enc,
            encoder.b_enc,
            own,
            kernels=encoder.kernels,
            compute_dtype=encoder.compute_dtype,
        )
        gathered = [torch.empty_like(values_NK) for _ in range(size)]
        dist.all_gather(gathered, values_NK, group=self.group)
        # Stable: among equal values the lower latent comes first, as in one process.
        candidates_NC, places_NC = torch.cat(gathered, dim=1).sort(dim=1, descending=True, stable=True)
        best_NK, places_NK = candidates_NC[:, :k], places_NC[:, :k] - rank * own
        mine = (places_NK >= 0) & (places_NK < own)
        picked_NK = indices_NK.gather(1, places_NK.clamp(0, own - 1))
        return torch.where(mine, best_NK, 0.0), torch.where(mine, picked_NK, -1)


class LatentShard(SAE):
    """The latents that one rank of a group holds."""

    def __init__(self, whole: SAE, rank: int, group: dist.ProcessGroup) -> None:
        """Copies this rank's rows out of `whole`."""
        with torch.device("meta"):
            super().__init__(whole.config, kernels=whole.kernels, compute_dtype=whole.compute_dtype)
        self.group = group
        self.activation = GroupTopK(group)  # type: ignore[assignment]
        self.num_dead = 0
        """Dead latents of the whole group."""
        rows = whole.config.d_latent // dist.get_world_size(group)
        held = slice(rank * rows, (rank + 1) * rows)
        parameters = dict(whole.named_parameters())
        for name, tensor in whole.state_dict().items():
            part = tensor.clone() if name in WHOLE else tensor[held].clone()
            if name in parameters:
                setattr(self, name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def _pre_bias(self) -> Tensor | None:
        bias = super()._pre_bias()
        return None if bias is None else sum_backward(bias, self.group)

    def _decode_picks(self, values_NK: Tensor, indices_NK: Tensor, order: PairOrder) -> Tensor:
        return sum_forward(super()._decode_picks(values_NK, indices_NK, order), self.group)

    def _auxk(self, residual_ND: Tensor, centred_ND: Tensor, dead: Tensor | None) -> Tensor | None:
        """As shared.sae.losses.auxk_loss, with the group's dead latents as one pool."""
        if dead is None or self.config.auxk_alpha == 0 or self.num_dead == 0:
            return None
        num_aux = self.config.num_aux
        z_NR = torch.relu(torch.addmm(self.b_enc[dead], centred_ND, self.W_enc[dead].T))
        if self.num_dead > num_aux:
            z_NR = z_NR * (z_NR.detach() >= self._kth_largest(z_NR.detach(), num_aux))
        decoded_ND = sum_forward(z_NR @ self.W_dec[dead], self.group)
        error_N = (residual_ND - decoded_ND).square().sum(1)
        energy_N = residual_ND.square().sum(1).clamp_min(torch.finfo(residual_ND.dtype).tiny)
        return (error_N / energy_N).mean() * min(self.num_dead / num_aux, 1.0)

    def _kth_largest(self, z_NR: Tensor, k: int) -> Tensor:
        """The k-th largest pre-activation of each row over the whole group: [N, 1]. There are at least k, all >= 0."""
        own = min(k, z_NR.shape[1])
        best_NK = z_NR.new_zeros(z_NR.shape[0], k)
        best_NK[:, :own] = z_NR.topk(own, dim=1).values
        gathered = [torch.empty_like(best_NK) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, best_NK, group=self.group)
        return torch.cat(gathered, dim=1).topk(k, dim=1).values[:, -1:]


class LatentParallel(Replicated):
    """A mesh of dp x latent ranks."""

    def __init__(self, world: World, latent: int) -> None:
        """Raises GranaryError when `latent` does not divide the number of ranks."""
        super().__init__(world)
        if latent < 1 or world.size % latent:
            raise GranaryError(f"parallel.latent={latent} does not divide the {world.size} processes")
        self.mesh = init_device_mesh(world.device.type, (world.size // latent, latent), mesh_dim_names=("dp", "latent"))
        self.latent = latent
        self.dp_group, self.latent_group = self.mesh.get_group("dp"), self.mesh.get_group("latent")
        self.latent_rank = self.mesh.get_local_rank("latent")

    @property
    def stream_rank(self) -> int:
        """The ranks of a latent group read the same rows."""
        return self.mesh.get_local_rank("dp")

    @property
    def stream_world(self) -> int:
        """Latent groups."""
        return self.world.size // self.latent

    def num_latents(self, config: SAEConfig) -> int:
        """An equal share of them. Raises GranaryError when there is none, or no such activation."""
        if config.d_latent % self.latent:
            raise GranaryError(
                f"{config.d_latent} latents do not divide among parallel.latent={self.latent}: change sae.expansion"
            )
        if config.activation != "topk":
            raise GranaryError(f"parallel=latent knows sae.activation=topk, not {config.activation}: use parallel=fsdp")
        return config.d_latent // self.latent

    def distribute(self, sae: SAE) -> SAE:
        """Keep the rank's own latents."""
        return LatentShard(super().distribute(sae), self.latent_rank, self.latent_group)

    def losses(self, sae: SAE, rows_N_D: Tensor, dead_R: Tensor, *, last: bool) -> SAELosses:
        """The l0 of a shard counts its own picks: scale it so that the mean over ranks is the whole."""
        losses = super().losses(sae, rows_N_D, dead_R, last=last)
        losses.metrics["l0"] = losses.metrics["l0"] * self.latent
        return losses

    def reduce_gradients(self, optimiser: SAEAdam) -> Tensor:
        """Over the data-parallel ranks that hold the same latents."""
        found = gradients(optimiser)
        if self.stream_world > 1:
            sum_over(found, self.dp_group)
        named = dict(zip(optimiser.parameters, found, strict=True))
        parts = [grad for name, grad in named.items() if name not in WHOLE]
        return joint_norm(parts, [grad for name, grad in named.items() if name in WHOLE], self.latent_group)

    def merge_dead(self, tokens_since_fired_F: Tensor) -> None:
        """Over the ranks that hold the same latents."""
        if self.stream_world > 1:
            dist.all_reduce(tokens_since_fired_F, dist.ReduceOp.MIN, group=self.dp_group)

    def look_at_dead(self, sae: SAE, dead_now_F: Tensor) -> Tensor:
        """Also counts the whole group's, so that all its ranks agree whether AuxK is on."""
        count = dead_now_F.sum()
        dist.all_reduce(count, group=self.latent_group)
        assert isinstance(sae, LatentShard)
        sae.num_dead = int(count)
        return super().look_at_dead(sae, dead_now_F)

    def mean_over_latents(self, mean: Tensor) -> float:
        """All ranks hold equally many."""
        mean = mean.clone()
        dist.all_reduce(mean, group=self.latent_group)
        return float(mean) / self.latent

    def as_global(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything with one row per latent is a shard of the whole."""
        seen = {}
        for name, tensor in tensors.items():
            if name not in ("optim.num_steps", "metrics.sums") and name.rpartition(".")[2] not in WHOLE:
                tensor = DTensor.from_local(tensor, self.mesh, [Replicate(), Shard(0)], run_check=False)
            seen[name] = tensor
        return seen
