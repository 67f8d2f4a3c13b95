"""Parts of the pass to one result, a block of latents at a time.

Counts are added, sums of floats in the order of the parts, and of the records of all parts the smallest keys are kept:
so a block's result does not depend on who did which part.
"""

import numpy as np

from shared.latents.layout import NONE, TOKENS
from stage_inspect.finish.pictures import Kept
from stage_inspect.scan.log import BESIDE, RECORDS, Columns, join, take
from stage_inspect.scan.pairs import Ints, lengths, starts_of
from stage_inspect.scan.parts import PartFile
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import Chance, full_keys


def merge_block(files: list[PartFile], block: int, first: int, settings: Settings, chance: Chance) -> Columns:
    """One block, whose first latent is `first`, from all parts in their order."""
    merged: Columns = {}
    logs: dict[str, list[Columns]] = {name: [] for name in RECORDS}
    for file in files:
        piece = file.piece(block)
        for name, parts in logs.items():
            parts.append({key.removeprefix(f"{name}/"): c for key, c in piece.items() if key.startswith(f"{name}/")})
        part = {key: c for key, c in piece.items() if key.partition("/")[0] not in logs}
        if not merged:
            merged = {key: c.astype(np.uint64) if c.dtype == np.uint32 else c.copy() for key, c in part.items()}
        else:
            np.maximum(merged["max"], part.pop("max"), out=merged["max"])
            for key, column in part.items():
                merged[key] += column
    num_latents = len(merged["max"])
    merged["max"] = np.where(merged["count/fired"] > 0, merged["max"], 0).astype(np.float32)
    top = smallest(join(logs["top"]), "top", settings.top, chance)
    sample = by_value(smallest(join(logs["sample"]), "sample", settings.sample, chance))
    tokens = smallest(join(logs["tokens"]), "tokens", settings.token_sample, chance)
    merged |= token_lists(tokens, first, num_latents)
    merged["records/top"] = counts_of(top, first, num_latents)
    merged["records/all"] = merged["records/top"] + counts_of(sample, first, num_latents)
    both = join([top, sample])
    kind = np.repeat([0, 1], [len(top["latent"]), len(sample["latent"])])
    records = take(both, np.lexsort((np.arange(len(kind)), kind, both["latent"])))
    merged |= {f"record/{name}": column for name, column in records.items()}
    if not logs["pictures"][0]:
        return merged
    pictures = smallest(join(logs["pictures"]), "pictures", settings.top, chance)
    merged["seen/all"] = counts_of(pictures, first, num_latents)
    return merged | {f"seen/{name}": column for name, column in pictures.items()}


def smallest(columns: Columns, name: str, count: int, chance: Chance) -> Columns:
    """Choose each latent's `count` records of the smallest keys, of equal keys the earliest, in that order."""
    order = np.lexsort((columns["place"], full_keys(name, columns, chance), columns["latent"]))
    latent = columns["latent"][order].astype(np.int64)
    starts = starts_of(latent)
    rank = np.arange(len(latent)) - np.repeat(starts, lengths(starts, len(latent)))
    return take(columns, order[rank < count])


def by_value(columns: Columns) -> Columns:
    """Records of each latent by falling value."""
    return take(columns, np.lexsort((columns["place"], -columns["value"].astype(np.float64), columns["latent"])))


def counts_of(columns: Columns, first: int, num_latents: int) -> Ints:
    """Records of each latent."""
    return np.bincount(columns["latent"].astype(np.int64) - first, minlength=num_latents)


def token_lists(columns: Columns, first: int, num_latents: int) -> Columns:
    """The tokens that a latent fired on most often in its sample, and those that followed; the smaller id at a tie."""
    found: Columns = {"tokens/sampled": counts_of(columns, first, num_latents).astype(np.uint32)}
    latent = columns["latent"].astype(np.int64) - first
    for name, column in (("firing", columns["token"]), ("next", columns["next"])):
        there = column != NONE
        pairs, counts = np.unique(np.stack([latent[there], column[there]]), axis=1, return_counts=True)
        order = np.lexsort((pairs[1], -counts, pairs[0]))
        row, token, count = pairs[0][order], pairs[1][order], counts[order]
        starts = starts_of(row)
        rank = np.arange(len(row)) - np.repeat(starts, lengths(starts, len(row)))
        kept = rank < TOKENS
        tokens = np.full((num_latents, TOKENS), NONE, np.int32)
        numbers = np.zeros((num_latents, TOKENS), np.uint32)
        tokens[row[kept], rank[kept]], numbers[row[kept], rank[kept]] = token[kept], count[kept]
        found |= {f"tokens/{name}": tokens, f"tokens/{name}_count": numbers}
    return found


def table_columns(merged: Columns) -> Columns:
    """A merged block as rows of the folder's arrays, but for its records."""
    counts = {name.removeprefix("count/"): merged[name] for name in merged if name.startswith("count/")}
    columns: Columns = {f"table/{name}": column for name, column in counts.items()}
    columns["table/fired_train"] = counts["fired"] - counts["fired_heldout"]
    columns |= {f"table/sum{number + 1}": merged["sums"][:, number] for number in range(merged["sums"].shape[1])}
    columns["table/max"] = merged["max"]
    return columns | {name: merged[name] for name in merged if name.startswith(("tokens/", "histogram", "positions"))}


def window_starts(merged: Columns) -> Ints:
    """Places at which the windows of a merged block's records begin, ascending, each once."""
    return np.unique(merged["record/place"].astype(np.int64) - merged["record/back"])


def seen_columns(merged: Columns, kept: Kept) -> Columns:
    """Rows of ``seen/*`` and ``regions/*`` of a merged block."""
    pictures = kept.picture_of(merged["seen/place"])
    return {
        "seen/picture": pictures,
        "seen/value": merged["seen/value"],
        "seen/regions": merged["seen/active"],
        "regions/grid": kept.grid_of(np.repeat(pictures, merged["seen/active"]), merged["seen/image"]),
        "regions/cell": np.stack([merged["seen/row"], merged["seen/col"]], 1),
        "regions/share": merged["seen/share"],
    }


def record_columns(merged: Columns, windows: Ints) -> Columns:
    """Rows of ``examples/*`` and ``active/*``; `windows` are the places of all windows that are stored, ascending."""
    start = merged["record/place"].astype(np.int64) - merged["record/back"]
    return {
        "examples/window": np.searchsorted(windows, start),
        "examples/position": merged["record/back"],
        "examples/value": merged["record/value"],
        "examples/active": merged["record/active"],
        **{f"active/{name}": merged[f"record/{name}"] for name in BESIDE},
    }
