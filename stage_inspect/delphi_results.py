"""delphi's results: ``explanations/`` and ``scores/{fuzz|detection}/``, one file ``{hookpoint}_latent{i}.txt`` each."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from shared.basics.documents import parse_json, typed
from shared.basics.errors import GranaryError
from shared.latents.notes import Made
from stage_inspect.explain.scores.measure import auc_of, f1_of, figure, mean_of_shares
from stage_inspect.export.delphi_scores import NAMES

DELPHI = "delphi"  # the method of its explanations
FILE = re.compile(r"(.+)_latent(\d{1,9})\.txt")

Scored = tuple[str, float | None, float | None, float | None, dict[str, Any]]


def read_results(folder: Path, hookpoint: str | None, num_latents: int) -> list[Made]:
    """Explanations with their scores. Raises GranaryError for wrong files and an unclear hookpoint."""
    named = [(FILE.fullmatch(path.name), path) for path in sorted((folder / "explanations").glob("*.txt"))]
    files = {(found[1], int(found[2])): path for found, path in named if found is not None}
    there = sorted({name for name, _ in files})
    if hookpoint is None and len(there) != 1:
        told = f"of {', '.join(there)}: choose with --hookpoint" if there else "that delphi wrote"
        raise GranaryError(f"{folder} has {'' if there else 'no '}explanations {told}")
    if hookpoint is not None and hookpoint not in there:
        raise GranaryError(f"{folder} has no explanations of --hookpoint {hookpoint}: it has {', '.join(there)}")
    chosen = hookpoint or there[0]
    made = []
    for (name, latent), path in sorted(files.items()):
        if name != chosen:
            continue
        if latent >= num_latents:
            raise GranaryError(f"{path} is of latent {latent}: there are {num_latents} latents")
        text = typed(str, parse_json(contents(path), path), str(path)).strip()
        scores = (scored(ours, folder / "scores" / theirs / path.name) for ours, theirs in NAMES.items())
        found_scores = tuple(score for score in scores if score is not None)
        if text:
            made.append(Made(latent, text, {"hookpoint": chosen}, found_scores))
    return made


def contents(path: Path) -> str:
    """Text of a file. Raises GranaryError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GranaryError(f"{path} can't be read: {error}") from None


def scored(name: str, path: Path) -> Scored | None:
    """A score from a list of judged examples; None where there is no such file, or it judges nothing."""
    if not path.is_file():
        return None
    rows = typed(list[dict[str, Any]], parse_json(contents(path), path), str(path))
    judged = [judgement(row, f"{path}, example {number}") for number, row in enumerate(rows, 1)]
    sides = [[one for one in judged if one[0] == truth and one[1] is not None] for truth in (True, False)]
    counts = {"active": sum(truth for truth, *_ in judged), "unread": sum(said is None for _, said, _ in judged)}
    details: dict[str, Any] = {"counts": {**counts, "silent": len(judged) - counts["active"]}}
    if not all(sides):
        return name, None, None, None, {"why": "no answer could be read", **details}
    hits = [(sum(said == truth for truth, said, _ in side), len(side)) for side in sides]
    said = [np.array([float(bool(one[1])) for one in side]) for side in sides]
    details["f1"] = figure(f1_of, said[0], said[1])
    sure = [np.array([one[2] for one in side if one[2] is not None]) for side in sides]
    if all(map(len, sure)):
        details["auc"] = figure(auc_of, sure[0], sure[1])
    return name, *mean_of_shares(hits[0], hits[1]), details


def judgement(row: dict[str, Any], where: str) -> tuple[bool, bool | None, float | None]:
    """(whether the latent fires there, what was said, how surely). Raises GranaryError."""
    truth, said, certainty = row.get("activating"), row.get("prediction"), row.get("probability")
    if type(truth) is not bool or not (said is None or type(said) is bool):
        raise GranaryError(f"{where} has no activating and prediction of true or false")
    if isinstance(certainty, bool) or not isinstance(certainty, int | float) or not 0 <= certainty <= 1:
        return truth, said, None
    return truth, said, float(certainty)
