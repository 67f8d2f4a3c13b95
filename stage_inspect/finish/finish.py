"""The latents folder from the parts of the pass: merged block by block, written array by array, meta.json last."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.latents.meta import Meta
from shared.latents.vocabulary import Vocabulary
from shared.latents.writer import LatentsWriter
from shared.lm.head import load_head
from shared.lm.recorded import recorded_vocabulary
from shared.sae.rows import decoder_rows
from shared.sae.variants import Dictionary
from shared.store.io.base import ObjectIO
from stage_inspect.finish.merge import merge_block, record_columns, seen_columns, table_columns, window_starts
from stage_inspect.finish.pictures import Kept, write_pictures
from stage_inspect.finish.silent import choose_pool, silent_columns
from stage_inspect.finish.together import together
from stage_inspect.finish.weights import (
    MOST_COMPARED,
    logit_columns,
    neighbour_columns,
    stream_rows,
    weight_columns,
)
from stage_inspect.finish.windows import window_rows
from stage_inspect.job import InspectJob
from stage_inspect.scan import parts
from stage_inspect.scan.log import Columns
from stage_inspect.scan.pairs import Ints
from stage_inspect.scan.places import position_edges
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import LATENTS_PER_BLOCK, Chance

log = logging.getLogger(__name__)


def finish(io: ObjectIO, job: InspectJob, dictionary: Dictionary, settings: Settings, identity: str) -> Meta:
    """Write the folder of parts that are all there, and remove them; killed anywhere, it can be begun again."""
    files = [open_part(io, number, identity) for number in range(len(job.parts))]
    chance = Chance(job.num_latents, settings)
    num_blocks = len(files[0]) - 1
    candidates = whole_of(files, "pool/place").astype(np.int64)
    pool = choose_pool(candidates, settings.pool, chance)
    windows_of_records, peaks = merge(io, files, settings, chance, identity)
    wanted = np.union1d(pool, windows_of_records)

    edges = position_edges(job.store.seq_len)
    writer = LatentsWriter.begin(io, {"window": settings.window, "positions": len(edges)})
    windows = write_windows(writer, job, wanted, settings.window)
    merged = (open_merged(io, block, identity) for block in range(num_blocks))
    kept = write_pictures(writer, job.store, peaks, settings.window) if job.store.plan.has_images else None
    dead = write_blocks(writer, merged, windows, kept)
    writer.append("silent/window", np.searchsorted(windows, pool))
    fired = (whole_of(files, "pool/window"), whole_of(files, "pool/latent"))
    writer.append_all(silent_columns(*fired, pool, job.num_latents))
    del fired
    sampled = write_together(writer, files, job.num_latents)
    write_weights(writer, job, dictionary)
    vocabulary = find_vocabulary(job)
    if vocabulary is not None:
        writer.vocabulary(vocabulary)
    totals = [{name: c for name, c in whole(file).items() if name.startswith(("total/", "tokens"))} for file in files]
    meta = describe(job, settings, identity, totals, edges, dead, sampled, writer.axes)
    writer.finish(meta)
    parts.remove(io)
    return meta


def merge(
    io: ObjectIO, files: list[parts.PartFile], settings: Settings, chance: Chance, identity: str
) -> tuple[Ints, Ints]:
    """Put each block of latents, merged from all parts; returns places of the windows that its records need, and of the
    peaks of its pictures."""
    wanted, peaks = np.empty(0, np.int64), np.empty(0, np.int64)
    for block in range(len(files[0]) - 1):
        merged = merge_block(files, block, block * LATENTS_PER_BLOCK, settings, chance)
        parts.write(io, parts.merged_key(block), identity, [merged], replace=True)
        wanted = np.union1d(wanted, window_starts(merged))
        peaks = np.union1d(peaks, merged.get("seen/place", peaks[:0]).astype(np.int64))
    return wanted, peaks


def open_part(io: ObjectIO, number: int, identity: str) -> parts.PartFile:
    """A part that was seen to be there."""
    file = parts.PartFile.open(io, parts.part_key(number), identity)
    if file is None:
        raise GranaryError(f"{io.url}/{parts.part_key(number)} has vanished: run the same command again")
    return file


def whole(file: parts.PartFile) -> Columns:
    """What of a part belongs to no one latent."""
    return file.piece(len(file) - 1)


def whole_of(files: list[parts.PartFile], name: str) -> npt.NDArray[Any]:
    """One column of it, of all parts."""
    return np.concatenate([whole(file)[name] for file in files])


def open_merged(io: ObjectIO, block: int, identity: str) -> Columns:
    """A block that was merged."""
    file = parts.PartFile.open(io, parts.merged_key(block), identity)
    assert file is not None
    return file.piece(0)


def write_windows(writer: LatentsWriter, job: InspectJob, wanted: Ints, window: int) -> Ints:
    """The windows' rows; returns their places, ascending."""
    found = [np.empty(0, np.int64)]
    for rows in window_rows(job.store, wanted, window):
        writer.append_all(rows)
        found.append(rows["windows/start"])
    return np.concatenate(found)


def write_blocks(writer: LatentsWriter, merged: Iterator[Columns], windows: Ints, kept: Kept | None) -> int:
    """All that the pass tells of the latents, `kept` of a multimodal store; returns how many never fired."""
    records = active = dead = seen = regions = 0
    begun = ["examples/offsets", "examples/active_offsets"]
    for name in [*begun, "seen/offsets", "seen/region_offsets"] if kept is not None else begun:
        writer.append(name, np.zeros(1, np.uint64))
    for block in merged:
        writer.append_all(table_columns(block))
        rows = record_columns(block, windows)
        ends = np.cumsum(block["records/all"])
        beside = np.append(0, np.cumsum(rows["examples/active"], dtype=np.int64))
        writer.append("examples/offsets", records + ends)
        writer.append("examples/active_offsets", active + beside[ends])
        writer.append("examples/top", block["records/top"])
        writer.append_all(rows)
        records, active = records + len(rows["examples/value"]), active + int(beside[-1])
        if kept is not None:
            ends = np.cumsum(block["seen/all"])
            cells = np.append(0, np.cumsum(block["seen/active"], dtype=np.int64))
            writer.append("seen/offsets", seen + ends)
            writer.append("seen/region_offsets", regions + cells[ends])
            writer.append_all(seen_columns(block, kept))
            seen, regions = seen + len(block["seen/value"]), regions + int(cells[-1])
        dead += int((block["count/fired"] == 0).sum())
    return dead


def write_together(writer: LatentsWriter, files: list[parts.PartFile], num_latents: int) -> int:
    """Which latents fire together; returns on how many tokens they were compared."""
    count_N = whole_of(files, "together/count").astype(np.int64)
    latent, value = whole_of(files, "together/latent"), whole_of(files, "together/value")
    for rows in together(count_N, latent.astype(np.int64), value.astype(np.float64), num_latents):
        writer.append_all(rows)
    return len(count_N)


def write_weights(writer: LatentsWriter, job: InspectJob, dictionary: Dictionary) -> None:
    """Norms, map, neighbours, logit weights; the last only where what is written is in the residual stream."""
    decoder = decoder_rows(dictionary)
    writer.append_all(weight_columns(dictionary, decoder))
    if len(decoder) <= MOST_COMPARED or decoder.is_cuda:
        for rows in neighbour_columns(decoder):
            writer.append_all(rows)
    stream = stream_rows(dictionary, decoder, job.folder.sites, job.folder.widths)
    if job.model is None or stream is None:
        return
    for rows in logit_columns(stream, load_head(job.model.path, job.model.revision, device=stream.device)):
        writer.append_all(rows)


def find_vocabulary(job: InspectJob) -> Vocabulary | None:
    """The bytes of the tokens that were harvested; None, with a warning, where their tokenizer can't be had."""
    try:
        tokens, special = recorded_vocabulary(job.cfg.model, job.store)
    except GranaryError as error:
        log.warning("examples will show token ids, not text: %s", error)
        return None
    return Vocabulary.of(tokens, special)


def describe(
    job: InspectJob,
    settings: Settings,
    identity: str,
    of_parts: list[Columns],
    edges: list[int],
    dead: int,
    together_tokens: int,
    axes: dict[str, int],
) -> Meta:
    """``meta.json``."""
    totals = {
        name.removeprefix("total/"): sum(int(one[name].sum()) for one in of_parts)
        for name in sorted(of_parts[0])
        if name.startswith("total/")
    }
    counts: dict[str, Any] = totals | {
        "tokens_train": totals["tokens"] - totals["tokens_heldout"],
        "tokens_by_position": np.sum([one["tokens_by_position"] for one in of_parts], axis=0).tolist(),
        "dead": dead,
    }
    provenance = job.store.plan.provenance
    if job.store.plan.has_images and not provenance["images"].get("assistant"):
        del counts["tokens_assistant"]  # nobody marked what it said
    model = dict(provenance.get("model") or {})
    if "model_path" in job.store.plan.versions:
        model["path"] = job.store.plan.versions["model_path"]
    return Meta(
        num_latents=job.num_latents,
        dictionary=job.sources["dictionary"],
        store=job.sources["store"],
        model=model,
        tokenizer=dict(provenance.get("tokenizer") or {}),
        counts=counts,
        settings=settings.to_json() | {"identity": identity},
        position_edges=edges,
        histogram_origin=settings.origin,
        together_tokens=together_tokens,
        seq_len=job.store.seq_len,
        axes=axes,
        versions=job.versions(),
    )
