"""Feature splitting and absorption (Chanin et al. 2024, SAEBench): how many latents a concept is split into, and where
they leave it to others.

Splitting. Latents are added to a probe one by one, each the one along which the loss falls fastest. The main latents
are the first, and those behind it up to the first that raises F1 by no more than `JUMP`.

Absorption. p is the unit direction of a probe on the whole activation, d_l what a unit of latent l writes, b what the
dictionary writes where nothing fires. Latent l projects proj_l = a_l <p, d_l> of the <p, y - b> that there is. Of the
examples that the probe finds,

    full      all main latents are silent, the latent of the largest proj has cos(p, d_l) >= 0.025 and 0.4 of <p, y - b>
    fraction  with m the main latents' proj and S the sum of the three largest others' (cos >= 0.1, proj > 0):
              0 where m >= <p, y - b> or S < 0.4 <p, y - b>; else 1 where m <= 0; else A / (A + m),
              A = min(S, <p, y - b> - m)

SAEBench takes <p, y> for <p, y - b>: latents make up y less b, so that is what can be shared out among them.
F latents, n tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from shared.text.documents import Ints
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.logistic import fit
from stage_eval.supervised.material import Material
from stage_eval.supervised.resamples import Doubles
from stage_eval.supervised.sample import Task

JUMP = 0.03
MOST_MAIN = 10
LEAST_F1 = 0.6
"""Of the main latents: below it what they miss says nothing."""
FULL_COSINE, FRACTION_COSINE, SHARE, ABSORBERS = 0.025, 0.1, 0.4, 3
SILENT = 1e-8


@dataclass(frozen=True)
class Split:
    """The latents of a concept."""

    main: list[int]
    number: Doubles
    """Replicates of how many they are, over the fitting half's documents."""
    fitted_f1: float
    f1: Doubles
    """Replicates of the main latents' F1 on the other half."""


@dataclass(frozen=True)
class Written:
    """What each latent writes, and what the dictionary writes without any."""

    row_FD: torch.Tensor
    """float64, in the units of what is written."""
    base_ND: torch.Tensor


def split(material: Material, codes: Codes, task: Task) -> Split:
    """The main latents of a concept."""
    rows, is_yes_N, document_N = material.rows(task), task.of("yes"), material.sample.document_N
    yes_fit = is_yes_N[rows.fitted]
    size_F = np.sqrt(codes.energy(rows.fitted))
    weight_n = np.where(yes_fit, 0.5 / yes_fit.sum(), 0.5 / (~yes_fit).sum())
    residual_n = weight_n * np.where(yes_fit, 0.5, -0.5)  # of a probe that knows nothing
    chosen: list[int] = []
    fitted_f1, tested_f1 = [], []
    for _ in range(min(MOST_MAIN, int((size_F > 0).sum()))):
        slope_F = np.abs(codes.summed(residual_n, rows.fitted)) / np.where(size_F > 0, size_F, np.inf)
        slope_F[chosen] = -1
        chosen.append(int(slope_F.argmax()))
        probe = fit(codes.columns(chosen, rows.fitted), torch.from_numpy(yes_fit))
        logits_n = probe.logits(codes.columns(chosen, rows.fitted)).numpy()
        residual_n = weight_n * (yes_fit - 1 / (1 + np.exp(-logits_n)))
        says_n = probe.logits(codes.columns(chosen, rows.tested)).numpy() > 0
        fitted_f1.append(material.fitted.f1(logits_n > 0, yes_fit, document_N[rows.fitted]))
        tested_f1.append(material.tested.f1(says_n, is_yes_N[rows.tested], document_N[rows.tested]))
    curve_kR = np.stack(fitted_f1)
    rises_kR = np.diff(curve_kR, axis=0) > JUMP
    number = 1 + np.cumprod(rises_kR, axis=0).sum(0).astype(np.float64)
    count = int(number[0])
    return Split(chosen[:count], number, float(curve_kR[count - 1, 0]), tested_f1[count - 1])


def absorption(
    material: Material, codes: Codes, task: Task, main: list[int], written: Written
) -> tuple[Doubles, Doubles, Ints]:
    """Full absorption (0 or 1), its fraction, and the document, [n] each, of examples that a probe on the activation
    finds in the scoring half."""
    probe = material.probe(task, "yes")
    tested = material.rows(task).tested
    found = tested[task.of("yes")[tested] & (material.logits(probe, tested) > 0)]
    direction_D = probe.weight_D / probe.weight_D.norm()
    along_F = (written.row_FD @ direction_D).numpy()
    cosine_F = along_F / np.maximum(written.row_FD.norm(dim=1).numpy(), 1e-30)
    at = torch.from_numpy(found)
    there_n = ((material.y_ND[at].double() - written.base_ND[at].double()) @ direction_D).numpy()
    is_main_F = np.isin(np.arange(codes.num_latents), main)
    full_n, fraction_n = shares(codes, found, along_F, cosine_F, is_main_F, there_n)
    return full_n, fraction_n, material.sample.document_N[found]


def shares(
    codes: Codes, rows_n: Ints, along_F: Doubles, cosine_F: Doubles, is_main_F: np.ndarray, there_n: Doubles
) -> tuple[Doubles, Doubles]:
    """Full absorption (0 or 1) and its fraction on each token, [n]."""
    index_nK = codes.index_NK[rows_n]
    is_main_nK, cosine_nK = np.append(is_main_F, False)[index_nK], np.append(cosine_F, -1.0)[index_nK]
    proj_nK = codes.written(along_F, rows_n)
    main_n = np.where(is_main_nK, proj_nK, 0).sum(1)
    is_silent_n = ~(is_main_nK & (codes.value_NK[rows_n] >= SILENT)).any(1)
    may_absorb = ~is_main_nK & (cosine_nK >= FRACTION_COSINE) & (proj_nK > 0)
    taken_n = np.sort(np.where(may_absorb, proj_nK, 0), axis=1)[:, -ABSORBERS:].sum(1)
    absorbed_n = np.minimum(taken_n, there_n - main_n)
    part_n = np.divide(absorbed_n, absorbed_n + main_n, out=np.ones_like(main_n), where=(main_n > 0) & (absorbed_n > 0))
    none_n = (main_n >= there_n) | (there_n <= 0) | (taken_n < SHARE * there_n)
    top_n = proj_nK.argmax(1)
    at_top = np.arange(len(rows_n)), top_n
    full_n = is_silent_n & (there_n > 0) & (cosine_nK[at_top] >= FULL_COSINE) & (proj_nK[at_top] >= SHARE * there_n)
    return full_n.astype(np.float64), np.where(none_n, 0.0, part_n)
