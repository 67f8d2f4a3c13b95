"""delphi's cache: ``latents/{hookpoint}/{first}_{last}.safetensors``, which its ``LatentDataset`` reads.

A row is one example (a record of the folder) with its own tokens, so the cache holds the strongest and the sampled
windows, not the whole corpus. An activation above float16's largest is kept at that; delphi would make it infinite.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.notes import RULE
from stage_inspect.export.delphi_scores import write_scores
from stage_inspect.export.facts import chosen_latents

MULTIPLE = 32  # delphi divides a row into windows of 32 tokens
LARGEST = 65_504.0
SMALL_INDEX = 1 << 16
TOKEN_BYTES = 8 << 30  # of the rows at most


def write(latents: Latents, folder: Path, chosen: str | None, model_id: str, source: str) -> int:
    """One file, for delphi takes the rows of the first for those of all; returns how many latents it holds."""
    numbers = [number for number in chosen_latents(chosen, latents) if latents.table["fired"][number]]
    if not numbers:
        raise GranaryError("none of these latents ever fires: delphi can't read an empty cache")
    home = folder / "latents" / source
    settings = latents.meta.settings
    width = -(-(settings["before"] + 1 + settings["after"]) // MULTIPLE) * MULTIPLE
    if len(numbers) * (settings["top"] + settings["sample"]) * width * 8 > TOKEN_BYTES:
        raise GranaryError(f"{len(numbers):,} latents are too many for delphi's one file: give fewer by --latents")
    home.mkdir(parents=True, exist_ok=True)
    write_file(latents, home, numbers, 0, latents.num_latents - 1, width)
    config = {"model_name": model_id, "cache_ctx_len": width, "dataset_repo": str(latents.meta.store["url"])}
    config |= {"n_tokens": latents.meta.counts["tokens"], "n_splits": 1}
    (home / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_explanations(latents, folder, numbers, source)
    return len(numbers)


def write_explanations(latents: Latents, folder: Path, numbers: list[int], source: str) -> None:
    """``explanations/{hookpoint}_latent{i}.txt``, a JSON string each: a latent's newest that is no rule, or its rule.

    delphi has one explanation of a latent. The scores of that go with it where they are lists of judged examples.
    """
    home = folder / "explanations"
    for number in numbers:
        said = latents.notes.explanations(number)
        if said:
            chosen = next((one for one in reversed(said) if one.method != RULE), said[-1])
            home.mkdir(exist_ok=True)
            (home / f"{source}_latent{number}.txt").write_text(json.dumps(chosen.text), encoding="utf-8")
            write_scores(latents, folder / "scores", chosen, f"{source}_latent{number}.txt")


def write_file(latents: Latents, home: Path, numbers: list[int], first: int, last: int, width: int) -> None:
    """One file: locations (row, position, latent - first), activations, and the rows' tokens."""
    rows: list[npt.NDArray[np.int64]] = []
    locations: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[np.float32]] = []
    for number in numbers:
        seen: set[tuple[int, int]] = set()
        for one in latents.top(number) + latents.sample(number):
            if (one.context, one.position) in seen:
                continue
            seen.add((one.context, one.position))
            row = np.zeros(width, np.int64)
            row[: len(one.tokens)] = one.tokens
            fired = np.flatnonzero(one.values)
            locations.append(np.stack([np.full(len(fired), len(rows)), fired, np.full(len(fired), number - first)], 1))
            values.append(np.clip(one.values[fired], -LARGEST, LARGEST))
            rows.append(row)
    places = np.concatenate(locations)
    kind = np.uint16 if len(rows) < SMALL_INDEX and last - first < SMALL_INDEX else np.uint32
    tensors = {
        "locations": torch.from_numpy(places.astype(kind)),
        "activations": torch.from_numpy(np.concatenate(values).astype(np.float16)),
        "tokens": torch.from_numpy(np.stack(rows)),
    }
    save_file(tensors, home / f"{first}_{last}.safetensors")
