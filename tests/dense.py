"""The losses of every kind of dictionary by plain autograd over dense [N, F] latents, from their definitions.

Slow, and without this project's kernels, steps or selection: what tests compare values and every gradient with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.sae.contexts import Contexts, Given
from shared.sae.groups import LatentGroup
from shared.sae.learn.config import LearningConfig
from shared.sae.variants import Dictionary, Lorsa, MoLT


def assert_same_gradients(made: Dictionary, loss: Tensor, expected: Tensor, *, keep: bool = False) -> None:
    """Every parameter's gradient of both losses, none of them 0; `keep`: `expected` is compared with again."""
    names = dict(made.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()))
    wanted = torch.autograd.grad(expected, list(names.values()), retain_graph=keep)
    for name, one, other in zip(names, found, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()), name
        assert float(other.norm()) > 0, name


def dense_loss(made: Dictionary, learning: LearningConfig, x: Given, y_ND: Tensor, dead_F: Tensor) -> Tensor:
    """The total loss; `dead_F` is bool over all latents, group after group. A Lorsa's `x` are whole contexts."""
    x_ND = x if isinstance(x, Tensor) else x.counted(x.rows_CTD)
    normal_ND = (x_ND - made.input_mean) * columns(made.input_scale, made.widths.reads)
    target_ND = normal_ND
    if not made.config.is_autoencoder:
        target_ND = (y_ND - made.output_mean) * columns(made.output_scale, made.widths.writes)
    weight_D = site_weights(made)
    groups = list(zip(made.groups, made.places, strict=True))
    pre = []
    for group, (reads, _) in groups:
        given_ND = normal_ND[:, reads]
        if made.config.pre_bias:
            given_ND = given_ND - made.b_dec
        if isinstance(x, Contexts):
            assert isinstance(made, Lorsa)
            mixed_NHD = attended(made, x)
            per_head = mixed_NHD.repeat_interleave(made.config.latents_per_head, 1)
            pre.append((per_head * made.W_enc).sum(2) + made.b_enc)
            mixed = mixed_NHD.detach()
        else:
            pre.append(given_ND @ group.W_enc.T + group.b_enc)
    latents = activate(made, learning, pre)
    error_ND = decode(made, latents, normal_ND) + made.b_dec - target_ND
    if hasattr(made, "W_skip"):
        error_ND = error_ND + normal_ND @ made.W_skip.T
    loss = (error_ND.square() @ weight_D).mean()
    sizes = [group.num_latents for group, _ in groups]
    residual_ND = -error_ND.detach()
    for (group, (reads, writes)), z_NF, f_NF, dead in zip(groups, pre, latents, dead_F.split(sizes), strict=True):
        loss = loss + learning.penalty_weight * penalty(made, group, learning, z_NF, f_NF)
        given_ND = normal_ND[:, reads].detach()
        if made.config.pre_bias:
            given_ND = given_ND - made.b_dec.detach()
        dead_z_NF = given_ND @ group.W_enc.T + group.b_enc
        if isinstance(x, Contexts):
            assert isinstance(made, Lorsa)
            per_head = mixed.repeat_interleave(made.config.latents_per_head, 1)
            dead_z_NF = (per_head * made.W_enc).sum(2) + made.b_enc
        own = auxk(group, learning, dead_z_NF, given_ND, residual_ND[:, writes], dead)
        loss = loss + learning.auxk_alpha / len(groups) * own
    if made.config.activation == "gated":
        (group, _) = groups[0]
        gate_ND = written(group, torch.relu(pre[0]), normal_ND, frozen=True) + made.b_dec.detach() - target_ND
        if hasattr(made, "W_skip"):
            gate_ND = gate_ND + (normal_ND @ made.W_skip.T).detach()
        loss = loss + (gate_ND.square() @ weight_D).mean()
    return loss


def columns(scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """One scale per site as one per column."""
    return torch.cat([one.expand(width) for one, width in zip(scale.reshape(-1), widths, strict=True)])


def site_weights(made: Dictionary) -> Tensor:
    """Each written site counts alike: 1 / (T V_t)."""
    sites = made.target_variance.split(list(made.widths.writes))
    return torch.cat([(1 / (len(sites) * part.sum())).expand(len(part)) for part in sites])


def gates(made: Dictionary, group: LatentGroup, writes: slice) -> Tensor | None:
    """What multiplies relu(z) where latents are chosen: the sum of the norms of a row's parts, under gate=sum."""
    if getattr(made.config, "gate", "joint") != "sum":
        return None
    parts = group.W_dec.split(list(made.widths.writes), dim=1)
    return torch.stack([part.norm(dim=1) for part in parts]).sum(0)


def activate(made: Dictionary, learning: LearningConfig, pre: list[Tensor]) -> list[Tensor]:
    """Latents [N, F] of every group."""
    kind, k = made.config.activation, made.config.k
    together = getattr(made.config, "k_scope", "group") == "all"
    if kind in ("topk", "batchtopk"):
        assert k is not None
        chosen = []
        for group, (_, writes), z_NF in zip(made.groups, made.places, pre, strict=True):
            gate = gates(made, group, writes)
            chosen.append((torch.relu(z_NF) if gate is None else torch.relu(z_NF) * gate).detach())
        sets = [torch.cat(chosen, 1)] if together else chosen
        kept = [(keep(values, k) if kind == "topk" else keep_batch(values, k)) for values in sets]
        if together:
            kept = list(kept[0].split([z_NF.shape[1] for z_NF in pre], dim=1))
        return [torch.relu(z_NF) * mask for z_NF, mask in zip(pre, kept, strict=True)]
    found = []
    for group, z_NF in zip(made.groups, pre, strict=True):
        if kind == "relu":
            found.append(torch.relu(z_NF))
        elif kind == "jumprelu":
            log_threshold = group.activation.log_threshold
            assert isinstance(log_threshold, Tensor)
            found.append(straight_through(z_NF, log_threshold, learning.bandwidth, z_NF))
        else:
            r_mag, b_mag = group.activation.r_mag, group.activation.b_mag
            assert isinstance(r_mag, Tensor)
            magnitude_NF = torch.exp(r_mag) * (z_NF - group.b_enc) + b_mag
            found.append(torch.relu(magnitude_NF) * (z_NF.detach() > 0))
    return found


def straight_through(z_NF: Tensor, log_threshold_F: Tensor, bandwidth: float, value_NF: Tensor) -> Tensor:
    """`value` where z > theta; theta's gradient is that of a rectangle around it, times theta for value = z."""
    theta_F = log_threshold_F.exp()
    near_NF = (((z_NF - theta_F).abs() < bandwidth / 2) & (z_NF > 0)).to(z_NF)
    height_F = theta_F.detach() if value_NF is z_NF else torch.ones_like(theta_F)
    step_NF = -height_F / bandwidth * near_NF.detach() * (theta_F - theta_F.detach())
    return value_NF * (z_NF > theta_F) + step_NF


def keep(values_NF: Tensor, k: int) -> Tensor:
    """1 at the k largest positive of each row."""
    mask = torch.zeros_like(values_NF).scatter(1, values_NF.topk(k).indices, 1.0)
    return mask * (values_NF > 0)


def keep_batch(values_NF: Tensor, k: int) -> Tensor:
    """1 at the N k largest of all."""
    least = values_NF.flatten().topk(len(values_NF) * k).values[-1]
    return ((values_NF >= least) & (values_NF > 0)).to(values_NF)


def written(group: LatentGroup, f_NF: Tensor, read_ND: Tensor, *, frozen: bool = False) -> Tensor:
    """``f W_dec``; of a MoLT the sum of its maps, each written out as a matrix, times f."""
    if not isinstance(group, MoLT):
        return f_NF @ (group.W_dec.detach() if frozen else group.W_dec)
    maps_FED = maps(group).detach() if frozen else maps(group)
    return torch.einsum("nf,fed,nd->ne", f_NF, maps_FED, read_ND)


def maps(molt: MoLT) -> Tensor:
    """``U_i V_i`` of every transform, [F, D_out, D_in]."""
    return torch.stack([molt.U[first:last].T @ molt.V[first:last] for first, last in molt.ranks.spans()])


def row_norms(group: LatentGroup) -> Tensor:
    """What a latent of value 1 writes at most, [F]."""
    return maps(group).flatten(1).norm(dim=1) if isinstance(group, MoLT) else group.W_dec.norm(dim=1)


def decode(made: Dictionary, latents: list[Tensor], read_ND: Tensor) -> Tensor:
    """Sum over the groups of what they write, each into the columns that are its own."""
    y_ND = torch.zeros(len(latents[0]), made.widths.d_out, dtype=latents[0].dtype)
    for group, (_, writes), f_NF in zip(made.groups, made.places, latents, strict=True):
        start, stop, _ = writes.indices(made.widths.d_out)
        y_ND = y_ND + F.pad(written(group, f_NF, read_ND), (start, made.widths.d_out - stop))
    return y_ND


def penalty(made: Dictionary, group: LatentGroup, learning: LearningConfig, z_NF: Tensor, f_NF: Tensor) -> Tensor:
    """Mean over tokens of the summed penalty of a group's latents."""
    if learning.penalty == "none":
        return z_NF.new_zeros(())
    if learning.penalty == "l0":
        log_threshold = group.activation.log_threshold
        assert isinstance(log_threshold, Tensor)
        fired_NF = straight_through(z_NF, log_threshold, learning.bandwidth, torch.ones_like(z_NF))
        return fired_NF.sum(1).mean()
    strength_NF = torch.relu(z_NF) if made.config.activation == "gated" else f_NF
    writes = made.places[list(made.groups).index(group)][1]
    gate = gates(made, group, writes)
    norms_are_1 = made.config.unit_norm_decoder and getattr(made.config, "tying", "none") != "per_target"
    norm_F = row_norms(group) if gate is None and not norms_are_1 else gate
    if norm_F is not None:
        strength_NF = strength_NF * norm_F
    if learning.penalty == "tanh":
        strength_NF = torch.tanh(learning.tanh_scale * strength_NF)
    return strength_NF.sum(1).mean()


def auxk(
    group: LatentGroup,
    learning: LearningConfig,
    pre_NF: Tensor,
    given_ND: Tensor,
    residual_ND: Tensor,
    dead_F: Tensor,
) -> Tensor:
    """What the k_aux largest dead latents of a group leave of its residual, relative to that."""
    num_dead = int(dead_F.sum())
    if num_dead == 0 or learning.auxk_alpha == 0:
        return given_ND.new_zeros(())
    k_aux = learning.num_aux(residual_ND.shape[1])
    z_NF = torch.where(pre_NF > 0, pre_NF, learning.auxk_slope * pre_NF) * dead_F
    picked = z_NF.detach().masked_fill(~dead_F, -torch.inf).topk(min(k_aux, num_dead)).indices
    decoded_ND = written(group, z_NF * torch.zeros_like(z_NF).scatter(1, picked, 1.0), given_ND)
    error_N = (residual_ND - decoded_ND).square().sum(1) / residual_ND.square().sum(1)
    return min(num_dead / k_aux, 1.0) * error_N.mean()


def attended(lorsa: Lorsa, x: Contexts) -> Tensor:
    """``sum_s A_h[t, s] x~_s`` [N, H, D] at the positions that count, one query and one head at a time."""
    config, found = lorsa.config, []
    x_CTD = (x.rows_CTD - lorsa.input_mean) * lorsa.input_scale
    T = x_CTD.shape[1]
    for place in x.places_N.tolist():
        rows_TD, documents_T, t = x_CTD[place // T], x.documents_CT[place // T], place % T
        keys = [s for s in range(t + 1) if documents_T[s] == documents_T[t]]
        start = keys[0]
        if config.window is not None:
            keys = keys[-config.window :]
        heads = []
        for head in range(config.qk_heads):
            q_E = turned(lorsa, rows_TD[t], head, "Q", t - start)
            scores = torch.stack([q_E @ turned(lorsa, rows_TD[s], head, "K", s - start) for s in keys]) * config.scale
            if config.softcap is not None:
                scores = config.softcap * torch.tanh(scores / config.softcap)
            heads.append(torch.softmax(scores, 0) @ rows_TD[keys])
        found.append(torch.stack(heads))
    return torch.stack(found)


def turned(lorsa: Lorsa, x_D: Tensor, head: int, which: str, position: int) -> Tensor:
    """A query or key of one position: its pairs of features are complex numbers, turned by an angle each."""
    config, tensors = lorsa.config, dict(lorsa.named_parameters())
    row_E = tensors[f"W_{which}"][head] @ x_D + tensors[f"b_{which}"][head]
    if config.norm_eps is not None:
        row_E = tensors[f"norm_{which}"][head] * row_E / (row_E.square().mean() + config.norm_eps).sqrt()
    half = len(config.frequencies)
    angle_R = position * torch.tensor(config.frequencies, dtype=row_E.dtype)
    pairs_R = torch.complex(row_E[:half], row_E[half : 2 * half])
    pairs_R = pairs_R * torch.polar(torch.full_like(angle_R, config.rope_scale), angle_R)
    return torch.cat([pairs_R.real, pairs_R.imag, row_E[2 * half :]])
