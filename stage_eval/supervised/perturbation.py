"""Targeted probe perturbation (Karvonen et al. 2024, SAEBench): has each kind of token latents of its own?

Every token is of one kind alone, and of each kind there is a probe against all others. The latents of kind c with the
largest effect, max(0, mean a_l on c - mean a_l elsewhere) <w_c, d_l>, are ablated; the score is what the probe of c
then loses of its balanced accuracy, less what the other kinds' probes lose on average.
"""

from collections.abc import Callable

import numpy as np
import torch

from stage_eval.results.supervised import KindFigures, Perturbation
from stage_eval.supervised.ablation import ablated, along, at_random, chosen, counts
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.material import Material
from stage_eval.supervised.resamples import Doubles, mean, ranged
from stage_eval.supervised.sample import Task


def perturb(material: Material, codes: Codes, task: Task, row_FD: torch.Tensor) -> Perturbation:
    """The score by the number of ablated latents; `row_FD`: what a unit of each latent writes."""
    rows, kinds = material.rows(task), task.groups
    document_n, ablates = material.sample.document_N[rows.tested], counts(codes.num_latents)
    is_kind = [task.of(kind) for kind in kinds]
    probes = [material.probe(task, kind) for kind in kinds]
    logits = [material.logits(probe, rows.tested) for probe in probes]
    alongs = [along(probe, row_FD) for probe in probes]

    def accuracy(number: int, latents: list[int]) -> Doubles:
        logit_n = ablated(logits[number], codes, rows.tested, alongs[number], latents)
        return material.tested.balanced(logit_n > 0, is_kind[number][rows.tested], document_n)

    before = [accuracy(number, []) for number in range(len(kinds))]

    def lost(number: int, latents: list[int]) -> tuple[Doubles, Doubles]:
        """By the kind's own probe, and by the others' on average."""
        drops = [before[other] - accuracy(other, latents) for other in range(len(kinds))]
        return drops[number], mean([drop for other, drop in enumerate(drops) if other != number])

    effects = [
        np.maximum(codes.difference(mark[rows.fitted], rows.fitted, written=True), 0) * row
        for mark, row in zip(is_kind, alongs, strict=True)
    ]
    drops = [[lost(number, chosen(effect_F, count)) for count in ablates] for number, effect_F in enumerate(effects)]
    return Perturbation(
        ablated=ablates,
        score=[ranged(mean([own - others for own, others in column])) for column in zip(*drops, strict=True)],
        random=[ranged(_control(material, codes, rows.tested, count, len(kinds), lost)) for count in ablates],
        kinds=[
            KindFigures(
                kind=kind,
                accuracy=ranged(before[number]),
                own=[ranged(own) for own, _ in drops[number]],
                others=[ranged(others) for _, others in drops[number]],
            )
            for number, kind in enumerate(kinds)
        ],
    )


def _control(
    material: Material,
    codes: Codes,
    rows_n: np.ndarray,
    count: int,
    kinds: int,
    lost: Callable[[int, list[int]], tuple[Doubles, Doubles]],
) -> Doubles:
    """The score of random latents, drawn for each kind anew."""
    found = []
    for number in range(kinds):
        for latents in at_random(codes, rows_n, count, material.seed + number):
            own, others = lost(number, latents)
            found.append(own - others)
    return mean(found)
