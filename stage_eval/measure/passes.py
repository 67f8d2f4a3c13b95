"""The two passes over the held-out contexts: stored activations through the SAEs, and the language model spliced.

Each rank does its share of fixed units of contexts; the sums of all ranks are added at the end.

Legend: T positions, D width of a site or of several side by side, N tokens of a context that are evaluated, M BOS or
replaced positions.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.lm.next_token import VocabularyHead
from shared.sae.contexts import Contexts, Given, as_attended, in_parts
from shared.sae.sites import Sites, side_by_side
from shared.sae.variants import Dictionary
from stage_eval.measure.activations import ActivationSums
from stage_eval.measure.data import read_ahead
from stage_eval.measure.diffing import DiffSums
from stage_eval.measure.downstream import (
    CLEAN,
    Condition,
    DownstreamSums,
    Replacement,
    Splice,
    mean_replacement,
    run_conditions,
    zero_replacement,
)
from stage_eval.measure.kinds import KINDS
from stage_eval.measure.session import Loaded, Session
from stage_eval.measure.sums import ReconstructionSums, Rows, Sums

SAE_ROWS = 4096
"""Tokens that go through an SAE at a time."""


@torch.inference_mode()
def reconstruction_pass(
    loaded: Sequence[Loaded], session: Session
) -> tuple[list[ReconstructionSums], dict[str, ActivationSums], list[DiffSums | None]]:
    """Sums of each dictionary, of each written site, and of differences, over the stored activations.

    A context is read once for all dictionaries of the same sites.
    """
    data, device = session.data, session.world.device
    sums = [new_sums(one, session) for one in loaded]
    diffs = [DiffSums.of(one.dictionary) for one in loaded]
    wanted = list(dict.fromkeys(one.sites for one in loaded))
    describes = first_to_write(wanted)
    described = {
        site: ActivationSums(len(session.statistics[site].mean), data.position_groups.num_bins, device)
        for site in describes
    }
    ranges = session.units()
    with progress("reconstruction", ranges, len(wanted), session) as bar:
        for context, sites, read in read_ahead(session.store, wanted, data, ranges):
            mask_1T = data.mask_CT[context : context + 1]
            bos_T = data.bos_CT[context] & ~mask_1T[0]
            rows = to_device(data.rows(context, mask_1T), device)
            at_tokens = {name: x_TD[mask_1T[0]].to(device) for name, x_TD in read.items()}
            at_bos = {name: x_TD[bos_T].to(device) for name, x_TD in read.items()}
            for site in sites.writes:
                if describes[site] == sites:
                    described[site].add(at_tokens[site], rows.position_N)
                    described[site].add_bos(at_bos[site])
            x: Given
            bos_x: Given
            x, y_ND = sites.pick(at_tokens)
            bos_x, bos_y_MD = sites.pick(at_bos)
            if sites.unit == "sequence":
                x, bos_x = (whole(session, context, read, sites, mask_T) for mask_T in (mask_1T[0], bos_T))
            for one, total, diff in zip(loaded, sums, diffs, strict=True):
                if one.sites == sites:
                    add_tokens(one.dictionary, x, y_ND, rows, total, diff)
                    if len(bos_x):
                        total.add_bos(bos_y_MD, decoded(one.dictionary, bos_x))
            bar.update(len(mask_1T[0]))
    everything: list[Sums] = [*sums, *described.values(), *(diff for diff in diffs if diff is not None)]
    for part in everything:
        part.all_reduce()
        part.to_cpu()
    return sums, described, diffs


def whole(session: Session, context: int, read: Mapping[str, Tensor], sites: Sites, counts_T: Tensor) -> Contexts:
    """An evaluated context for a dictionary that attends, of which these positions count."""
    device, data = session.world.device, session.data
    x_1TD = side_by_side({name: x_TD[None].to(device) for name, x_TD in read.items()}, sites.reads)
    segments_1T = data.segments_CT[context : context + 1]
    return Contexts.of(x_1TD, as_attended(segments_1T, isolated=session.store.isolated), counts_T[None])


def decoded(dictionary: Dictionary, x: Given) -> Tensor:
    """What a dictionary makes of what it reads."""
    result: Tensor = dictionary(x).x_hat
    return result


def new_sums(one: Loaded, session: Session) -> ReconstructionSums:
    """Empty sums of a dictionary; squares are taken about the training mean of what it writes."""
    return ReconstructionSums(
        contexts=len(session.data.contexts),
        d_latent=one.d_latent,
        positions=session.data.position_groups.num_bins,
        frequencies=session.data.frequency_groups.num_bins,
        shift_D=torch.cat([session.mean(site) for site in one.sites.writes]),
        kinds=0 if session.data.kind_CT is None else KINDS,
    )


def first_to_write(wanted: Sequence[Sites]) -> dict[str, Sites]:
    """Return, for each written site, the first of `wanted` that reads it from the store for that."""
    return {site: sites for sites in reversed(wanted) for site in sites.writes}


def add_tokens(
    dictionary: Dictionary, x: Given, y_ND: Tensor, rows: Rows, total: ReconstructionSums, diff: DiffSums | None
) -> None:
    """Add what a dictionary makes of x to produce y, a bounded number of rows at a time; for an SAE y is x."""
    given: Any  # what the dictionary's unit says
    for given, part in in_parts(x, SAE_ROWS):
        latents = dictionary.encode(given)
        total.add(y_ND[part], dictionary.decode(latents), latents.values, latents.indices, rows.part(part))
        if diff is not None:
            diff.add(given, y_ND[part], latents)


@torch.inference_mode()
def downstream_pass(
    model: PreTrainedModel, conditions: Sequence[Condition], session: Session, depths: Collection[int]
) -> DownstreamSums:
    """Sums of the next-token scores under every condition; `depths` as ``check_splices`` found them."""
    data, device = session.data, session.world.device
    head = VocabularyHead(model)
    sums = DownstreamSums(
        [condition.name for condition in conditions],
        contexts=len(data.contexts),
        positions=data.position_groups.num_bins,
        frequencies=data.frequency_groups.num_bins,
        device=device,
    )
    ranges = session.units()
    with progress("language model", ranges, 1, session) as bar:
        for start, stop in ranges:
            batch = data.batch(start, stop, session.settings.splice_bos)
            rows = to_device(data.rows(start, batch.scored_BT, label_offset=1), device)
            run_conditions(model, head, batch.to(device), conditions, sums, rows, depths)
            bar.update((stop - start) * data.tokens_CT.shape[1])
    sums.all_reduce()
    sums.to_cpu()
    return sums


def conditions_for(loaded: Sequence[Loaded], session: Session) -> list[Condition]:
    """Clean; zero and mean ablation of what each dictionary writes; each spliced; and, where asked for, all at once."""
    written = list(dict.fromkeys(one.sites.writes for one in loaded))
    zeros = {names: tuple(zero_ablation(name) for name in names) for names in written}
    means = {names: tuple(mean_ablation(name, session) for name in names) for names in written}
    spliced = [
        Splice(
            one.sites,
            reconstruct(one),
            one.widths.writes,
            one.widths.reads if one.dictionary.config.follows_depth else None,
        )
        for one in loaded
    ]
    conditions = [Condition(CLEAN)]
    for names in written:
        conditions.append(Condition(ablated("zero", names), zeros[names]))
        conditions.append(Condition(ablated("mean", names), means[names]))
    conditions += [Condition(one.label, (splice,)) for one, splice in zip(loaded, spliced, strict=True)]
    if session.settings.joint:
        conditions.append(Condition("sae joint", tuple(spliced)))
        conditions.append(Condition("zero joint", tuple(chain.from_iterable(zeros.values()))))
        conditions.append(Condition("mean joint", tuple(chain.from_iterable(means.values()))))
    return conditions


def ablated(kind: str, written: Sequence[str]) -> str:
    """Name of the condition in which all of the written sites are ablated; `kind` is zero or mean."""
    return f"{kind} {', '.join(written)}"


def zero_ablation(site: str) -> Splice:
    """Zero in place of a site's activation."""
    return Splice(Sites.of(site), zero_replacement)


def mean_ablation(site: str, session: Session) -> Splice:
    """The training mean in place of a site's activation."""
    return Splice(Sites.of(site), mean_replacement(session.mean(site).float()))


def reconstruct(one: Loaded) -> Replacement:
    """The dictionary's reconstruction as a replacement, a bounded number of rows at a time."""

    def replace(x: Given) -> Tensor:
        if not len(x):
            return one.dictionary.b_dec.new_zeros(0, one.widths.d_out)
        return torch.cat([decoded(one.dictionary, part) for part, _ in in_parts(x, SAE_ROWS)])

    return replace


def to_device(rows: Rows, device: torch.device) -> Rows:
    """The rows' indices on `device`."""
    kind_N = None if rows.kind_N is None else rows.kind_N.to(device)
    return Rows(rows.context_N.to(device), rows.position_N.to(device), rows.frequency_N.to(device), kind_N)


def progress(name: str, ranges: Sequence[tuple[int, int]], times: int, session: Session) -> "tqdm[None]":
    """Rank 0's bar over its own tokens; the other ranks run beside it at the same pace."""
    contexts = sum(stop - start for start, stop in ranges)
    return tqdm(
        total=contexts * times * session.data.tokens_CT.shape[1],
        desc=name,
        unit="tok",
        unit_scale=True,
        disable=not session.world.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
