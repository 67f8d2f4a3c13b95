"""All supervised scores of one dictionary."""

import numpy as np

from shared.sae.rows import decoder_rows, raw_rows
from shared.sae.variants import Dictionary
from stage_eval.results.supervised import Absorption, ConceptFigures, SupervisedFigures
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.labels import CONCEPTS, PAIRS
from stage_eval.supervised.material import Material
from stage_eval.supervised.perturbation import perturb
from stage_eval.supervised.probing import Replicates, probe_concept, probes
from stage_eval.supervised.removal import remove
from stage_eval.supervised.resamples import RESAMPLES, Doubles, mean, ranged
from stage_eval.supervised.splitting import LEAST_F1, Written, absorption, split

NO_ROWS = "its latents are maps of what they read: none writes a direction of its own"


def score(dictionary: Dictionary, material: Material, most: int) -> SupervisedFigures:
    """Every score, on the activations of `material`; `most`: tokens that were drawn of a kind and half at most."""
    sample = material.sample
    codes, base_ND = Codes.of(dictionary, material.x_ND, material.device)
    written = None
    left_out = dict(sample.left_out)
    if dictionary.config.writes_rows:
        row_FD = raw_rows(dictionary, decoder_rows(dictionary)).double().cpu()
        written = Written(row_FD, base_ND)
    else:
        left_out |= dict.fromkeys(("absorption", "perturbation", "removal"), NO_ROWS)
    scored = [
        _concept(material, codes, concept, written) for concept in CONCEPTS if f"concept {concept}" in sample.tasks
    ]
    columns = [one for _, one, _, _ in scored]
    absorbed = [one for _, _, _, one in scored if one is not None]
    pairs = [(pair, task) for pair in PAIRS if (task := sample.tasks.get(f"pair {pair.name}")) is not None]
    kinds = sample.tasks.get("kinds")
    return SupervisedFigures(
        seed=material.seed,
        most=most,
        resamples=RESAMPLES,
        tokens=len(sample),
        documents=sample.documents,
        probes=probes(columns) if columns else None,
        split=ranged(mean([number for _, _, number, _ in scored])) if scored else None,
        absorbed=ranged(mean([full for full, _ in absorbed])) if absorbed else None,
        absorbed_fraction=ranged(mean([fraction for _, fraction in absorbed])) if absorbed else None,
        concepts=[figures for figures, _, _, _ in scored],
        perturbation=None if kinds is None or written is None else perturb(material, codes, kinds, written.row_FD),
        removal=remove(material, codes, pairs, written.row_FD) if pairs and written is not None else None,
        left_out=left_out,
    )


def _concept(
    material: Material, codes: Codes, concept: str, written: Written | None
) -> tuple[ConceptFigures, Replicates, Doubles, tuple[Doubles, Doubles] | None]:
    """Figures of a concept; and replicates of its accuracies, of the number of its latents, of full and fraction."""
    task = material.sample.tasks[f"concept {concept}"]
    rows, is_yes_N = material.rows(task), task.of("yes")
    best, accuracies = probe_concept(material, codes, task)
    found = split(material, codes, task)
    absorbed, tokens = None, 0
    if written is not None and found.fitted_f1 >= LEAST_F1:
        full_n, fraction_n, document_n = absorption(material, codes, task, found.main, written)
        tokens, ones_n = len(full_n), np.ones(len(full_n))
        absorbed = (
            material.tested.ratio(full_n, ones_n, document_n),
            material.tested.ratio(fraction_n, ones_n, document_n),
        )
    figures = ConceptFigures(
        concept=concept,
        meaning=CONCEPTS[concept],
        examples=(int(is_yes_N[rows.fitted].sum()), int(is_yes_N[rows.tested].sum())),
        documents=len(np.unique(material.sample.document_N[rows.tested][is_yes_N[rows.tested]])),
        best=best,
        probes=probes([accuracies]),
        main=found.main,
        split=ranged(found.number),
        f1=ranged(found.f1),
        absorption=None
        if absorbed is None
        else Absorption(full=ranged(absorbed[0]), fraction=ranged(absorbed[1]), tokens=tokens),
    )
    return figures, accuracies, found.number, absorbed
