"""Explanations as a latent's page shows them: scores with their intervals and controls, and where they failed.

Details of a score come from whoever wrote it; what is not of the form that is read here is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shared.latents import Example, Latents
from shared.latents.notes import Explanation, Score

FACTS = {
    "precision": "precision",
    "recall": "recall",
    "base_rate": "base rate",
    "auc": "AUC",
    "train_f1": "F1 where found",
}
MOST_FAILED = 16


def explained(
    said: Explanation, scores: Sequence[Score], shown: Callable[[Any], dict[str, Any] | None]
) -> dict[str, Any]:
    """One explanation; `shown` makes an example of a failed one's record, or None."""
    return {
        "id": said.id,
        "text": said.text,
        "method": said.method,
        "author": said.author,
        "scores": [_scored(score, shown) for score in scores],
    }


def _scored(score: Score, shown: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any]:
    details = score.details
    controls = details.get("controls")
    failed = details.get("failed")
    examples = [shown(record) for record in failed[:MOST_FAILED]] if isinstance(failed, list) else []
    return {
        "scorer": score.scorer,
        **_measured({"value": score.value, "low": score.low, "high": score.high}),
        "facts": [[FACTS[name], short(details[name])] for name in FACTS if is_number(details.get(name))],
        "controls": [
            [str(name), _measured(control)]
            for name, control in (controls.items() if isinstance(controls, dict) else ())
            if isinstance(control, dict)
        ],
        "failed": [example for example in examples if example is not None],
        "why": str(details.get("why", "")),
    }


def _measured(record: dict[str, Any]) -> dict[str, float | None]:
    """Value and interval; None for what is not there."""
    return {name: short(record[name]) if is_number(record.get(name)) else None for name in ("value", "low", "high")}


def kept_example(record: Any, latents: Latents) -> Example | None:
    """The example that a score kept itself: tokens, values, peak, place in the store; None for what is none."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    tokens, values, peak, place = (record.get(name) for name in ("tokens", "values", "peak", "place"))
    if not isinstance(tokens, list) or not isinstance(values, list) or not 0 < len(tokens) == len(values) <= 1024:
        return None
    if not all(type(one) is int and -1 <= one < 1 << 31 for one in tokens) or not all(map(is_number, values)):
        return None
    if type(peak) is not int or not 0 <= peak < len(tokens) or type(place) is not int or not peak <= place < 1 << 62:
        return None
    context, position = divmod(place, latents.meta.seq_len)
    return Example(
        tokens=np.array(tokens, np.int32),
        values=np.array(values, np.float32),
        peak=peak,
        value=float(values[peak]),
        context=context,
        position=position,
        document=0,
        start=position - peak,
        vocabulary=latents.vocabulary,
    )


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and bool(np.isfinite(value))


def short(value: float) -> float:
    """Four digits: enough for a colour, a bar and a tooltip."""
    return float(f"{value:.4g}")
