"""The two passes over the held-out contexts: stored activations through the SAEs, and the language model spliced.

Each rank does its share of fixed units of contexts; the sums of all ranks are added at the end.

Legend: T positions, D d_model, N tokens of a context that are evaluated.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.lm.hookpoint import HookPoint
from shared.parallel import World
from shared.sae import SAE
from shared.store import HookStatistics, Store
from stage_eval.measure.activations import ActivationSums
from stage_eval.measure.data import EvaluationData, read_ahead, units
from stage_eval.measure.downstream import (
    CLEAN,
    Condition,
    DownstreamSums,
    Replacement,
    mean_replacement,
    run_conditions,
    zero_replacement,
)
from stage_eval.measure.sums import ReconstructionSums, Rows, Sums
from stage_eval.measure.vocabulary import VocabularyHead, check_head

SAE_ROWS = 4096
"""Tokens that go through an SAE at a time."""


@dataclass(frozen=True)
class Loaded:
    """An SAE in memory and the hook it reads."""

    label: str
    hook: HookPoint
    sae: SAE


@dataclass(frozen=True)
class Plan:
    """How the passes run."""

    world: World
    unit_contexts: int
    splice_bos: bool

    def units(self, data: EvaluationData) -> list[tuple[int, int]]:
        """This rank's ranges of contexts."""
        return units(len(data.contexts), self.unit_contexts, self.world)


@torch.inference_mode()
def reconstruction_pass(
    saes: Sequence[Loaded],
    store: Store,
    data: EvaluationData,
    statistics: dict[HookPoint, HookStatistics],
    plan: Plan,
) -> tuple[list[ReconstructionSums], dict[HookPoint, ActivationSums]]:
    """Sums of each SAE and of each hook over the stored activations; a context is read once for all SAEs of a hook."""
    device = plan.world.device
    sums = [
        ReconstructionSums(
            contexts=len(data.contexts),
            d_model=loaded.sae.config.d_model,
            d_latent=loaded.sae.config.d_latent,
            positions=data.position_groups.num_bins,
            frequencies=data.frequency_groups.num_bins,
            shift_D=torch.from_numpy(statistics[loaded.hook].mean).to(device),
        )
        for loaded in saes
    ]
    positions = data.position_groups.num_bins
    described = {loaded.hook: ActivationSums(loaded.sae.config.d_model, positions, device) for loaded in saes}
    hooks = list(map(str, described))
    ranges = plan.units(data)
    with progress("reconstruction", ranges, len(hooks), data, plan.world) as bar:
        for context, hook, x_TD in read_ahead(store, hooks, data, ranges):
            mask_1T = data.mask_CT[context : context + 1]
            bos_T = data.bos_CT[context] & ~mask_1T[0]
            rows = to_device(data.rows(context, mask_1T), device)
            x_ND, bos_MD = x_TD[mask_1T[0]].to(device), x_TD[bos_T].to(device)
            described[HookPoint.parse(hook)].add(x_ND, rows.position_N)
            described[HookPoint.parse(hook)].add_bos(bos_MD)
            for loaded, total in zip(saes, sums, strict=True):
                if str(loaded.hook) == hook:
                    add_tokens(loaded.sae, x_ND, rows, total)
                    if len(bos_MD):
                        total.add_bos(bos_MD, loaded.sae(bos_MD).x_hat)
            bar.update(len(x_TD))
    everything: list[Sums] = [*sums, *described.values()]
    for part in everything:
        part.all_reduce()
        part.to_cpu()
    return sums, described


def add_tokens(sae: SAE, x_ND: Tensor, rows: Rows, total: ReconstructionSums) -> None:
    """Encode, decode and add the tokens, a bounded number of rows at a time."""
    for start in range(0, len(x_ND), SAE_ROWS):
        part = slice(start, start + SAE_ROWS)
        latents = sae.encode(x_ND[part])
        chunk = Rows(rows.context_N[part], rows.position_N[part], rows.frequency_N[part])
        total.add(x_ND[part], sae.decode(latents), latents.values, latents.indices, chunk)


@torch.inference_mode()
def downstream_pass(
    model: PreTrainedModel,
    conditions: Sequence[Condition],
    data: EvaluationData,
    plan: Plan,
) -> DownstreamSums:
    """Sums of the next-token scores under every condition."""
    device = plan.world.device
    head = VocabularyHead(model)
    check_head(model, head)
    sums = DownstreamSums(
        [condition.name for condition in conditions],
        contexts=len(data.contexts),
        positions=data.position_groups.num_bins,
        frequencies=data.frequency_groups.num_bins,
        device=device,
    )
    ranges = plan.units(data)
    with progress("language model", ranges, 1, data, plan.world) as bar:
        for start, stop in ranges:
            batch = data.batch(start, stop, plan.splice_bos)
            rows = to_device(data.rows(start, batch.scored_BT, label_offset=1), device)
            run_conditions(model, head, batch.to(device), conditions, sums, rows)
            bar.update((stop - start) * data.tokens_CT.shape[1])
    sums.all_reduce()
    sums.to_cpu()
    return sums


def conditions_for(
    saes: Sequence[Loaded], statistics: dict[HookPoint, HookStatistics], device: torch.device, *, joint: bool
) -> list[Condition]:
    """Clean; zero and mean ablation of each hook; each SAE spliced; with `joint`, all SAEs and ablations at once."""
    hooks = list(dict.fromkeys(loaded.hook for loaded in saes))
    means = {hook: mean_replacement(torch.from_numpy(statistics[hook].mean).float().to(device)) for hook in hooks}
    conditions = [Condition(CLEAN)]
    for hook in hooks:
        conditions.append(Condition(f"zero {hook}", {hook: zero_replacement}))
        conditions.append(Condition(f"mean {hook}", {hook: means[hook]}))
    conditions += [Condition(f"sae {loaded.label}", {loaded.hook: reconstruct(loaded.sae)}) for loaded in saes]
    if joint:
        conditions.append(Condition("sae joint", {loaded.hook: reconstruct(loaded.sae) for loaded in saes}))
        conditions.append(Condition("zero joint", dict.fromkeys(hooks, zero_replacement)))
        conditions.append(Condition("mean joint", dict(means)))
    return conditions


def reconstruct(sae: SAE) -> Replacement:
    """The SAE's reconstruction as a replacement, a bounded number of rows at a time."""

    def replace(x_ND: Tensor) -> Tensor:
        return torch.cat([sae(part).x_hat for part in torch.split(x_ND, SAE_ROWS)]) if len(x_ND) else x_ND

    return replace


def to_device(rows: Rows, device: torch.device) -> Rows:
    """The rows' indices on `device`."""
    return Rows(rows.context_N.to(device), rows.position_N.to(device), rows.frequency_N.to(device))


def progress(
    name: str, ranges: Sequence[tuple[int, int]], times: int, data: EvaluationData, world: World
) -> "tqdm[None]":
    """Rank 0's bar over its own tokens; the other ranks run beside it at the same pace."""
    contexts = sum(stop - start for start, stop in ranges)
    return tqdm(
        total=contexts * times * data.tokens_CT.shape[1],
        desc=name,
        unit="tok",
        unit_scale=True,
        disable=not world.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
