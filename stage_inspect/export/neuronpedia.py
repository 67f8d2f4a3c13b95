"""Neuronpedia's files: the folder that its bulk import reads, and the payloads of its upload by the web.

Limits of the web upload: 128 features at a time, an index of at most 10,000,000, 20 logits at each end, 1 to 1,024
tokens in an example and none of them empty, explanations of 1 to 512 characters.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from stage_inspect.export.facts import chosen_latents, intervals
from stage_inspect.export.saedashboard import activations, feature

BATCH = 128
LARGEST_INDEX = 10_000_000
MOST_LOGITS, MOST_TOKENS, LONGEST_EXPLANATION = 20, 1024, 512
STEER = 10  # default strength of a direction whose largest activation is not given
SCORE_TYPES = {"detection": "eleuther_recall", "fuzzing": "eleuther_fuzz", "embedding": "eleuther_embedding"}
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


def write(latents: Latents, folder: Path, chosen: str | None, model_id: str, source: str) -> int:
    """All files; returns how many latents they hold. Raises GranaryError for an id that Neuronpedia refuses."""
    model_id, source = model_id.lower(), source.lower()
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    for name, text in (("--model-id", model_id), ("--source", source)):
        if not 1 <= len(text) <= 128 or not set(text) <= letters:
            raise GranaryError(f"{name} {text}: 1 to 128 letters, digits, - and _")
    if "-" not in source:
        raise GranaryError(f"--source {source}: write LAYER-SET, for example 2-granary-res")
    numbers = [number for number in chosen_latents(chosen, latents) if latents.table["fired"][number]]
    if numbers and numbers[-1] > LARGEST_INDEX:
        raise GranaryError(f"Neuronpedia takes latents up to {LARGEST_INDEX}")
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    home = folder / model_id / source
    for name in ("features", "activations", "explanations", "explanation_scores", "upload"):
        (home / name).mkdir(parents=True, exist_ok=True)
    for name, record in descriptions(latents, model_id, source, time).items():
        (home / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    for batch, start in enumerate(range(0, len(numbers), BATCH)):
        some = numbers[start : start + BATCH]
        common = {"modelId": model_id, "layer": source}
        lines(home / "features" / f"{batch}.jsonl.gz", (feature_row(latents, n, common, time) for n in some))
        rows = (row for n in some for row in activation_rows(latents, n, common, time))
        lines(home / "activations" / f"{batch}.jsonl.gz", rows)
        told = (row for n in some for row in explanation_rows(latents, n, common))
        lines(home / "explanations" / f"{batch}.jsonl.gz", told)
        scores = (row for n in some for row in score_rows(latents, n))
        lines(home / "explanation_scores" / f"{batch}.jsonl.gz", scores)
        payload = {"modelId": model_id, "source": source, "features": [upload(latents, n) for n in some]}
        (home / "upload" / f"{batch}.json").write_text(json.dumps(payload, allow_nan=False), encoding="utf-8")
    return len(numbers)


def lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Records as gzipped JSON lines, the same bytes for the same records."""
    with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as packed:
        for record in records:
            packed.write((json.dumps(record, allow_nan=False) + "\n").encode())


def descriptions(latents: Latents, model_id: str, source: str, time: str) -> dict[str, dict[str, Any]]:
    """The one line each of release, model, source set and source."""
    layer, _, name = source.partition("-")
    hook = latents.meta.dictionary["writes"][-1]
    return {
        "release": {"name": f"granary-{name}", "description": "made with Granary", "createdAt": time},
        "model": {
            "id": model_id,
            "displayName": model_id,
            "layers": int(layer) + 1,
            "neuronsPerLayer": 0,
            "owner": "granary",
            "createdAt": time,
        },
        "sourceset": {"modelId": model_id, "name": name, "releaseName": f"granary-{name}", "createdAt": time},
        "source": {"modelId": model_id, "id": source, "setName": name, "hookName": hook, "createdAt": time},
    }


def feature_row(latents: Latents, index: int, common: dict[str, str], time: str) -> dict[str, Any]:
    """A line of ``features``: SAEDashboard's lists under the same names, and Neuronpedia's own fields."""
    lists = feature(latents, index)
    for name in ("feature_index", "activations", "vector", "n_prompts_total", "n_tokens_in_prompt", "dataset"):
        del lists[name]
    near = latents.neighbours(index)
    numbers = latents.table
    return {
        **common,
        "index": str(index),
        "sourceSetName": common["layer"].partition("-")[2],
        "creatorId": "granary",
        "createdAt": time,
        "maxActApprox": float(numbers["max"][index]),
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": STEER,
        "hookName": latents.meta.dictionary["writes"][-1],
        "topkCosSimIndices": [one.latent for one in near],
        "topkCosSimValues": [one.value for one in near],
        "umap_x": float(numbers["map_x"][index]) if "map_x" in numbers else 0.0,
        "umap_y": float(numbers["map_y"][index]) if "map_y" in numbers else 0.0,
        **lists,
    }


def activation_rows(latents: Latents, index: int, common: dict[str, str], time: str) -> list[dict[str, Any]]:
    """Lines of ``activations``."""
    rows = []
    for number, (record, one) in enumerate(activations(latents, index)):
        values = record["values"]
        rows.append(
            {
                "id": identifier(latents, index, number),
                **common,
                "index": str(index),
                "tokens": record["tokens"],
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": one.peak,
                "minValue": min(values),
                "creatorId": "granary",
                "dataSource": str(latents.meta.store["url"]),
                "dataIndex": f"{one.context}:{one.start}",
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
                "binMin": record["bin_min"],
                "binMax": record["bin_max"],
                "binContains": record["bin_contains"],
                "qualifyingTokenIndex": one.peak,
                "createdAt": time,
            }
        )
    return rows


def explanation_rows(latents: Latents, index: int, common: dict[str, str]) -> list[dict[str, Any]]:
    """Lines of ``explanations``."""
    return [
        {
            "id": explanation_id(latents, one.id),
            **common,
            "index": str(index),
            "description": one.text,
            "authorId": "granary",
            "embedding": [],
            "triggeredById": None,
            "typeName": one.method,
            "explanationModelName": one.author,
            "notes": None,
            "createdAt": one.created,
            "scoreV1": 0,
            "scoreV2": None,
        }
        for one in latents.notes.explanations(index)
    ]


def explanation_id(latents: Latents, number: int) -> str:
    """The id of an explanation, which its scores name."""
    return word(f"{latents.meta.dictionary['sha256']}:{number}")


def score_rows(latents: Latents, index: int) -> list[dict[str, Any]]:
    """Lines of ``explanation_scores``, as Neuronpedia's table has them; a failed score has no value and is left out.

    Where Neuronpedia has a name for a score it is called by that; the model is the one that judged.
    """
    return [
        {
            "id": word(f"{latents.meta.dictionary['sha256']}:{said.id}:{number}"),
            "value": score.value,
            "explanationId": explanation_id(latents, said.id),
            "explanationScoreTypeName": SCORE_TYPES.get(score.scorer, score.scorer),
            "explanationScoreModelName": str(score.details.get("judge", said.author)),
            "jsonDetails": json.dumps({"low": score.low, "high": score.high, **score.details}),
            "createdAt": score.created,
        }
        for said in latents.notes.explanations(index)
        for number, score in enumerate(latents.notes.scores(said.id))
        if score.value is not None
    ]


def upload(latents: Latents, index: int) -> dict[str, Any]:
    """A feature of the web upload, within its limits."""
    latent = latents.latent(index)
    largest = float(latents.table["max"][index])
    shares = {(part.low, part.high): part.share for part in intervals(latents, index, 0)}
    examples = []
    for record, _ in activations(latents, index):
        low = max(record["bin_min"], 0.0)
        examples.append(
            {
                "tokens": record["tokens"][:MOST_TOKENS],
                "values": record["values"][:MOST_TOKENS],
                "quantileMin": low,
                "quantileMax": record["bin_max"],
                "quantileFraction": min(1.0, max(0.0, shares.get((low, record["bin_max"]), 0.0))),
            }
        )
    return {
        "index": index,
        "density": float(latents.table["density"][index]),
        "maxActApprox": largest,
        "topLogits": [{"token": one.text, "value": one.value} for one in latent.promoted[:MOST_LOGITS] if one.text],
        "bottomLogits": [{"token": one.text, "value": one.value} for one in latent.demoted[:MOST_LOGITS] if one.text],
        "explanations": [
            {"text": one.text[:LONGEST_EXPLANATION], "methodName": one.method, "modelName": one.author}
            for one in latent.explanations
            if one.text
        ],
        "activations": examples,
    }


def identifier(latents: Latents, index: int, number: int) -> str:
    """An id of 25 characters that no other record of any folder has: of dictionary, store, latent and record."""
    meta = latents.meta
    return word(f"{meta.dictionary['sha256']}:{meta.store['digest']}:{index}:{number}")


def word(text: str) -> str:
    """c and 24 letters of a hash."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    found = ""
    for _ in range(24):
        number, digit = divmod(number, len(LETTERS))
        found += LETTERS[digit]
    return f"c{found}"
