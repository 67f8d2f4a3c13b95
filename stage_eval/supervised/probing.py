"""Sparse probing (Gurnee et al. 2023, SAEBench): how well a few latents tell a concept's tokens from all others.

The k latents of the largest |mean on examples - mean on others| go into a logistic regression. Three controls see the
same tokens: as many coordinates of the activation, the whole activation, and the token without any activation.
n tokens, F latents, D width.
"""

import numpy as np
import torch
from torch import Tensor

from shared.text.documents import Ints, Marks
from stage_eval.results.supervised import Probes
from stage_eval.supervised.codes import Codes, largest
from stage_eval.supervised.logistic import fit
from stage_eval.supervised.material import Material, Rows
from stage_eval.supervised.resamples import Doubles, mean, ranged
from stage_eval.supervised.sample import Task

COUNTS = (1, 2, 5)
"""Latents that a probe sees."""

Replicates = dict[str, Doubles]
"""By ``latents 1`` and so on, ``coordinates 1`` and so on, ``activation``, ``token``."""


def probe_concept(material: Material, codes: Codes, task: Task) -> tuple[list[int], Replicates]:
    """The best latents of a concept, and balanced accuracies on the other half of the documents."""
    rows, is_yes_N = material.rows(task), task.of("yes")
    best = largest(np.abs(codes.difference(is_yes_N[rows.fitted], rows.fitted)), max(COUNTS))
    latents_fit, latents_test = codes.columns(best, rows.fitted), codes.columns(best, rows.tested)
    x_fit, x_test = (material.x_ND[torch.from_numpy(one)] for one in (rows.fitted, rows.tested))
    yes_fit = torch.from_numpy(is_yes_N[rows.fitted])
    apart_D = (x_fit[yes_fit].double().mean(0) - x_fit[~yes_fit].double().mean(0)).abs().numpy()
    axes = largest(apart_D, max(COUNTS))
    found = {}
    for count in COUNTS:
        found[f"latents {count}"] = _accuracy(material, rows, is_yes_N, latents_fit[:, :count], latents_test[:, :count])
        found[f"coordinates {count}"] = _accuracy(
            material, rows, is_yes_N, x_fit[:, axes[:count]], x_test[:, axes[:count]]
        )
    logits = material.logits(material.probe(task, "yes", written=False), rows.tested, written=False)
    found["activation"] = _balanced(material, rows, is_yes_N, logits > 0)
    found["token"] = _balanced(material, rows, is_yes_N, _says_token(material, rows, is_yes_N))
    return best, found


def probes(columns: list[Replicates]) -> Probes:
    """Figures of one concept, or their means over several."""
    means = {name: ranged(mean([one[name] for one in columns])) for name in columns[0]}
    return Probes(
        latents={str(count): means[f"latents {count}"] for count in COUNTS},
        coordinates={str(count): means[f"coordinates {count}"] for count in COUNTS},
        activation=means["activation"],
        token=means["token"],
    )


def _accuracy(material: Material, rows: Rows, is_yes_N: Marks, fit_nk: Tensor, test_nk: Tensor) -> Doubles:
    probe = fit(fit_nk, torch.from_numpy(is_yes_N[rows.fitted]))
    return _balanced(material, rows, is_yes_N, probe.logits(test_nk).numpy() > 0)


def _balanced(material: Material, rows: Rows, is_yes_N: Marks, says_n: Marks) -> Doubles:
    document_n = material.sample.document_N[rows.tested]
    return material.tested.balanced(says_n, is_yes_N[rows.tested], document_n)


def _says_token(material: Material, rows: Rows, is_yes_N: Marks) -> Marks:
    """Yes where the token is the more common among the fitting half's examples, both classes weighing the same."""
    token_N: Ints = material.sample.token_N
    size, fitted = int(token_N.max()) + 1, rows.fitted
    yes, no = (
        np.bincount(token_N[fitted[mark]], minlength=size) / mark.sum()
        for mark in (is_yes_N[fitted], ~is_yes_N[fitted])
    )
    found: Marks = (yes > no)[token_N[rows.tested]]
    return found
