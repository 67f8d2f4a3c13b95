"""delphi's ``scores/{fuzz|detection}/{hookpoint}_latent{i}.txt``: a JSON list of every example that was judged."""

import json
from pathlib import Path
from typing import Any

from shared.basics.documents import typed
from shared.basics.errors import GranaryError
from shared.latents.examples import Example
from shared.latents.folder import Latents
from shared.latents.notes import Explanation

NAMES = {"detection": "detection", "fuzzing": "fuzz"}
"""Of scores here: what delphi calls them."""
SILENT = -1  # delphi's distance of an example without a quantile

Judged = tuple[int, int, int | None, bool, bool | None, float | None]
"""Context, start, tenth by rank, truth, what was said, how surely: as `measure.judged` writes them."""


def write_scores(latents: Latents, folder: Path, said: Explanation, name: str) -> None:
    """A file for the newest of each kind of score of one explanation."""
    newest = {NAMES[one.scorer]: one for one in latents.notes.scores(said.id) if one.scorer in NAMES}
    examples: dict[tuple[int, int], Example] | None = None
    for kind, score in sorted(newest.items()):
        rows = judged_in(score.details)
        if not rows:
            continue
        examples = examples if examples is not None else windows(latents, said.latent)
        told = [told_of(examples[row[:2]], row) for row in rows if row[:2] in examples]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / name).write_text(json.dumps(told, allow_nan=False), encoding="utf-8")


def judged_in(details: dict[str, Any]) -> list[Judged]:
    """The judgements that a score keeps; none where it keeps none, or something else."""
    try:
        rows = typed(list[list[Any]], details.get("judged", []), "a score's judgements")
        return [typed(Judged, row, "a judgement") for row in rows]
    except GranaryError:
        return []


def windows(latents: Latents, index: int) -> dict[tuple[int, int], Example]:
    """Every window that a test of this latent can be of, by context and first position."""
    records, _ = latents.records(index)
    quiet = latents.silent(index, latents.array("silent/window").num_rows)
    found = latents.examples(records, within_window=True) + quiet
    return {(one.context, one.start): one for one in found}


def told_of(example: Example, row: Judged) -> dict[str, Any]:
    """One judged example as delphi has it; an answer that could not be read has no prediction."""
    _, _, quantile, truth, said, certainty = row
    return {
        "str_tokens": example.strings,
        "activations": example.values.tolist(),
        "distance": SILENT if quantile is None else quantile,
        "activating": truth,
        "prediction": said,
        "probability": certainty,
        "correct": None if said is None else said == truth,
    }
