"""Tables for pandas, DuckDB and Spark: latents, examples and lists of related latents, one Parquet file each."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.latents.folder import Latents
from stage_inspect.export.facts import chosen_latents

PER_GROUP = 64  # latents in a row group


def write(latents: Latents, folder: Path, chosen: str | None, model_id: str, source: str) -> int:
    """``latents``, ``examples``, ``related`` and ``explanations.parquet``; returns how many latents they hold."""
    numbers = chosen_latents(chosen, latents)
    about = {b"granary": latents.meta.to_bytes(), b"model_id": model_id.encode(), b"source": source.encode()}
    table = pa.table({name: column[numbers] for name, column in latents.table.items()})
    pq.write_table(table.replace_schema_metadata(about), folder / "latents.parquet", compression="zstd")
    for name, make in (("examples", examples), ("related", related), ("explanations", explanations)):
        writer: pq.ParquetWriter | None = None
        for start in range(0, len(numbers), PER_GROUP):
            rows = [row for number in numbers[start : start + PER_GROUP] for row in make(latents, number)]
            group = pa.Table.from_pylist(rows, SCHEMAS[name])
            writer = writer or pq.ParquetWriter(folder / f"{name}.parquet", SCHEMAS[name], compression="zstd")
            writer.write_table(group)
        if writer is not None:
            writer.close()
    return len(numbers)


SCHEMAS = {
    "examples": pa.schema(
        [
            ("latent", pa.int32()), ("kind", pa.string()), ("rank", pa.int32()), ("value", pa.float32()),
            ("context", pa.int64()), ("position", pa.int32()), ("document", pa.int32()), ("peak", pa.int32()),
            ("text", pa.string()), ("tokens", pa.list_(pa.int32())), ("values", pa.list_(pa.float32())),
        ]
    ),
    "explanations": pa.schema(
        [
            ("latent", pa.int32()), ("explanation", pa.int64()), ("text", pa.string()), ("method", pa.string()),
            ("author", pa.string()), ("scorer", pa.string()), ("value", pa.float64()), ("low", pa.float64()),
            ("high", pa.float64()), ("details", pa.string()),
        ]
    ),
    "related": pa.schema(
        [
            ("latent", pa.int32()), ("kind", pa.string()), ("other", pa.int32()), ("value", pa.float32()),
            ("count", pa.int64()),
        ]
    ),
}  # fmt: skip


def examples(latents: Latents, number: int) -> list[dict[str, Any]]:
    """Rows of one latent: its strongest records, then its sample."""
    return [
        {
            "latent": number, "kind": kind, "rank": rank, "value": one.value, "context": one.context,
            "position": one.position, "document": one.document, "peak": one.peak, "text": one.text,
            "tokens": one.tokens.tolist(), "values": one.values.tolist(),
        }
        for kind, found in (("top", latents.top(number)), ("sample", latents.sample(number)))
        for rank, one in enumerate(found)
    ]  # fmt: skip


def related(latents: Latents, number: int) -> list[dict[str, Any]]:
    """Rows of one latent: near ones, and those that fire with it."""
    latent = latents.latent(number)
    lists = {"cosine": latents.neighbours(number), "jaccard": latent.jaccard, "npmi": latent.npmi}
    return [
        {"latent": number, "kind": kind, "other": one.latent, "value": one.value, "count": one.count}
        for kind, found in {**lists, "pearson": latent.pearson}.items()
        for one in found
    ]


def explanations(latents: Latents, number: int) -> list[dict[str, Any]]:
    """Rows of one latent: each score of each explanation, and one without a score where there is none yet."""
    rows = []
    for said in latents.notes.explanations(number):
        common = {"latent": number, "explanation": said.id, "text": said.text, "method": said.method,
                  "author": said.author}  # fmt: skip
        scores = latents.notes.scores(said.id)
        rows += [
            {**common, "scorer": one.scorer, "value": one.value, "low": one.low, "high": one.high,
             "details": json.dumps(one.details)}
            for one in scores
        ] or [common]  # fmt: skip
    return rows
