"""Spurious correlation removal (SHIFT, Marks et al. 2024; SAEBench): can what a probe should not use be taken out?

Of a pair of labels one is the target and the other spurious. A biased probe is fitted on tokens that have both or
neither, so that it can't tell one from the other; a clean one where all four combinations weigh the same. A probe of
the spurious label chooses the latents with the largest |mean a_l with it - mean a_l without| |<w, d_l>|, which are
ablated from what the biased probe reads. On the four combinations of the other documents

    score = (accuracy ablated - accuracy biased) / (accuracy clean - accuracy biased)

Of the two ways to name target and spurious label the one is taken whose biased probe does worse on the half that it was
fitted on: there the bias has taken hold.
"""

import numpy as np
import torch

from shared.text.documents import Ints, Marks
from stage_eval.results.supervised import PairFigures, Removal
from stage_eval.supervised.ablation import ablated, along, at_random, chosen, counts
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.labels import Pair
from stage_eval.supervised.material import Material
from stage_eval.supervised.resamples import Doubles, Resamples, mean, ranged
from stage_eval.supervised.sample import Task

LEAST_GAP = 0.001
"""Of the clean over the biased accuracy: below it there is nothing to be given back."""
SIDES = (("both", "first"), ("both", "second"))
"""Groups that have the first label, and those that have the second."""


def remove(material: Material, codes: Codes, pairs: list[tuple[Pair, Task]], row_FD: torch.Tensor) -> Removal:
    """The score by the number of ablated latents; `row_FD`: what a unit of each latent writes."""
    ablates = counts(codes.num_latents)
    scored = [_remove(material, codes, pair, task, row_FD, ablates) for pair, task in pairs]
    return Removal(
        ablated=ablates,
        score=[ranged(mean(list(column))) for column in zip(*(scores for _, scores, _ in scored), strict=True)],
        random=[ranged(mean(list(column))) for column in zip(*(control for _, _, control in scored), strict=True)],
        pairs=[figures for figures, _, _ in scored],
    )


def _remove(
    material: Material, codes: Codes, pair: Pair, task: Task, row_FD: torch.Tensor, ablates: list[int]
) -> tuple[PairFigures, list[Doubles], list[Doubles]]:
    rows, together = material.rows(task), task.of("both", "neither")
    biased = material.probe(task, "both", among=together)
    fitted = material.logits(biased, rows.fitted) > 0
    worse = [_accuracy(material.fitted, material, task, rows.fitted, fitted, task.of(*side))[0] for side in SIDES]
    target, other = (0, 1) if worse[0] <= worse[1] else (1, 0)
    is_target_N, has_other_N = task.of(*SIDES[target]), task.of(*SIDES[other])

    def accuracy(logit_n: Doubles) -> Doubles:
        return _accuracy(material.tested, material, task, rows.tested, logit_n > 0, is_target_N)

    logit_n, along_F = material.logits(biased, rows.tested), along(biased, row_FD)
    spurious = material.probe(task, *SIDES[other])
    apart_F = codes.difference(has_other_N[rows.fitted], rows.fitted, written=True)
    effect_F = np.abs(apart_F * along(spurious, row_FD))
    clean = accuracy(material.logits(material.probe(task, *SIDES[target]), rows.tested))
    before = accuracy(logit_n)

    def score(latents: list[int]) -> Doubles:
        gained, gap = accuracy(ablated(logit_n, codes, rows.tested, along_F, latents)) - before, clean - before
        return np.divide(gained, gap, out=np.full_like(gap, np.nan), where=gap >= LEAST_GAP)

    scores = [score(chosen(effect_F, count)) for count in ablates]
    control = [mean([score(one) for one in at_random(codes, rows.tested, count, material.seed)]) for count in ablates]
    names = (pair.first, pair.second)
    figures = PairFigures(
        target=names[target],
        spurious=names[other],
        clean=ranged(clean),
        biased=ranged(before),
        score=list(map(ranged, scores)),
        random=list(map(ranged, control)),
    )
    return figures, scores, control


def _accuracy(
    resamples: Resamples, material: Material, task: Task, rows: Ints, says_n: Marks, is_target_N: Marks
) -> Doubles:
    """The mean over the four combinations of the share that is right."""
    document_n, is_right_n = material.sample.document_N[rows], says_n == is_target_N[rows]
    cells = [task.of(group)[rows] for group in task.groups]
    found: Doubles = np.stack([resamples.ratio(is_right_n & cell, cell, document_n) for cell in cells]).mean(0)
    return found
