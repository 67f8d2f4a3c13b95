"""FVU of each kind of token of a store with images: text, regions of images, what the assistant said."""

import math

import torch

from shared.basics.config import TokenKind
from shared.store.format.image_table import ASSISTANT, MARKS_KIND
from shared.store.pictures import of_kinds
from stage_eval.measure.sums import ReconstructionSums
from stage_eval.results.figures import TokenKindFigures

KINDS = (MARKS_KIND | ASSISTANT) + 1
"""Values that a position's kind may have."""


def kind_figures(sums: ReconstructionSums) -> dict[str, TokenKindFigures] | None:
    """Figures of each kind that has tokens; what the assistant said is text too. None for a store of text alone."""
    if "kind" not in sums.added:
        return None
    values_G = torch.arange(KINDS, dtype=torch.uint8).numpy()
    found = {}
    for kind in TokenKind:
        chosen_G = torch.from_numpy(of_kinds(values_G, [kind.value]))
        tokens, error, spread, norm = sums.added["kind"][chosen_G].sum(0).tolist()
        deviation_D = sums.added["kind_deviation_D"][chosen_G].sum(0)
        if tokens:
            scatter = spread - float(deviation_D.square().sum()) / tokens  # about the mean of the kind itself
            fvu = error / scatter if scatter > 0 else math.nan
            found[kind.value] = TokenKindFigures(tokens=int(tokens), fvu=fvu, mean_norm=norm / tokens)
    return found
