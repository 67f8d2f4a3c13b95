"""Latents folders of made-up content, for tests and benchmarks of whatever reads one.

F latents, N records, W tokens of a window, V tokens of the vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np

from shared.latents import layout
from shared.latents.folder import Latents
from shared.latents.global_weights import COLUMNS, GlobalWeightsWriter, WeightsMeta
from shared.latents.meta import Meta
from shared.latents.vocabulary import Vocabulary
from shared.latents.writer import LatentsWriter
from shared.store.io.open import open_io

HOSTILE = ["</script><img src=x onerror=alert(1)>", "&amp;", '"', "\0", "\u202e", "\u200b", "\n", "\t", "<0x0A>"]
WINDOW, WINDOWS, GROUPS = 16, 4, 3  # tokens of a window, windows of a context, groups of positions
BEFORE, AFTER, SEQ_LEN = 11, WINDOW // 4, WINDOW * WINDOWS


def synthetic_vocabulary() -> Vocabulary:
    """A special token, 256 single bytes, hostile texts, and words."""
    words = [f" word{number}" for number in range(100)]
    tokens = [b"<s>", *(bytes([byte]) for byte in range(256)), *(text.encode() for text in [*HOSTILE, *words])]
    return Vocabulary.of(tokens, special=[0])


def synthetic_latents(
    folder: Path,
    num_latents: int = 12,
    *,
    top: int = 5,
    sample: int = 10,
    num_windows: int = 40,
    window: int = WINDOW,
    recorded: int | None = None,
    seed: int = 0,
) -> Latents:
    """Write a folder whose latent 3 is dead, and open it; numbers are plausible, not those of any pass.

    `recorded`: the first so many latents alone have examples.
    """
    rng = np.random.default_rng(seed)
    F, R, V = num_latents, num_windows, len(synthetic_vocabulary())
    axes = {"window": window, "positions": GROUPS}
    writer = LatentsWriter.begin(open_io(folder), axes)
    alive = np.arange(F) != 3
    fired = (10 ** rng.uniform(1, 5, F)).astype(np.uint64) * alive
    scale = np.exp(rng.normal(size=F)) * alive
    columns: dict[str, Any] = {name: fired // (number + 1) for number, name in enumerate(layout.COUNTS)}
    columns |= {name: fired * scale**power for power, name in enumerate(layout.SUMS, 1)}
    columns["max"] = (3 * scale).astype(np.float32)
    columns |= {name: rng.normal(size=F) for name in (*layout.WEIGHTS, *layout.LOGIT_MOMENTS)}
    writer.append_all({f"table/{name}": column for name, column in columns.items()})
    histogram = np.zeros((F, layout.BINS), np.uint64)
    histogram[:, 20:26] = fired[:, None] // 6
    histogram[:, 26] = fired - histogram.sum(1)
    writer.append("histogram", histogram)
    writer.append("positions", np.repeat(fired[:, None] // GROUPS, GROUPS, axis=1))
    writer.append("tokens/sampled", np.minimum(fired, 64) * alive)
    near = (np.arange(F)[:, None] + 1 + np.arange(layout.NEAREST)) % F
    near[:, max(0, F - 1) :] = layout.NONE
    falling = np.tile(1 / (1 + np.arange(layout.NEAREST)), (F, 1))
    for path, spec in layout.ARRAYS.items():
        group, _, name = path.partition("/")
        if group in ("neighbours", "together") and len(spec.axes) == 2:
            is_index = name.endswith("latent")
            writer.append(path, near if is_index else np.full((F, layout.NEAREST), 7) if "count" in name else falling)
        elif group in ("tokens", "logits") and len(spec.axes) == 2 and spec.dtype != "float32":
            width = spec.row_shape(axes)[0]
            is_count = "count" in name or "histogram" in name
            ids = rng.integers(0, V, (F, width))
            writer.append(path, np.sort(rng.integers(1, 9, (F, width)))[:, ::-1] if is_count else ids)
        elif group == "logits":
            writer.append(path, np.sort(rng.normal(size=(F, layout.LOGITS)).astype(np.float32))[:, ::-1])
    writer.append("together/fired", fired // 2)
    rows = _write_examples(writer, rng, alive & (np.arange(F) < (recorded or F)), scale, top, sample, R, window)
    _write_windows(writer, rng, R, V, window)
    writer.append("silent/window", np.arange(0, R, 2))
    fired_in = [np.unique(own[own % 2 == 0] // 2) for own in rows]
    writer.append("silent/offsets", np.cumsum([0, *map(len, fired_in)]))
    writer.append("silent/fired", np.concatenate(fired_in))
    writer.vocabulary(synthetic_vocabulary())
    writer.finish(synthetic_meta(F, axes, top, sample))
    return Latents.open(folder)


def synthetic_meta(num_latents: int, axes: dict[str, int], top: int, sample: int) -> Meta:
    """What goes with it."""
    window = axes["window"]
    return Meta(
        num_latents=num_latents,
        dictionary={"path": "runs/demo/sae", "sha256": "0" * 64, "kind": "sae", "reads": ["layers.2.resid_post"],
                    "writes": ["layers.2.resid_post"], "activation": "topk"},
        store={"url": "runs/demo/store", "digest": "0" * 64, "split": "all", "shards": 4},
        model={"id": "bundled"},
        tokenizer={"hash": "0" * 64},
        counts={"tokens": 1_000_000, "tokens_train": 900_000, "tokens_heldout": 100_000, "contexts": 16_000,
                "documents": 20_000, "windows": 70_000, "tokens_by_position": [400_000, 300_000, 300_000], "dead": 1},
        settings={"window": window, "before": window * BEFORE // WINDOW, "after": window // 4, "top": top,
                  "sample": sample, "seed": 0},
        position_edges=[0, 16, 32],
        histogram_origin=-8,
        together_tokens=100_000,
        seq_len=window * WINDOWS,
        axes=axes,
    )  # fmt: skip


def _write_examples(
    writer: LatentsWriter, rng: Any, alive: Any, scale: Any, top: int, sample: int, windows: int, window: int
) -> list[Any]:
    """`top` records and a sample for each living latent, each with two active tokens beside its peak.

    Returns the windows of each latent's records.
    """
    F, each = len(alive), top + sample
    counts = alive * each
    writer.append("examples/offsets", np.cumsum([0, *counts]))
    writer.append("examples/top", alive * top)
    writer.append("examples/active_offsets", np.cumsum([0, *counts * 2]))
    shape = (F, each)
    value = -np.sort(-rng.uniform(0.01, 3, shape)) * scale[:, None]
    value[:, top:] = -np.sort(-value[:, top:] * 0.5)
    rows = {"window": rng.integers(0, windows, shape), "position": rng.integers(0, window - 4, shape), "value": value}
    writer.append_all({f"examples/{name}": part[alive].reshape(-1) for name, part in rows.items()})
    num = int(counts.sum())
    writer.append("examples/active", np.full(num, 2))
    writer.append("active/offset", np.tile([1, 2], num))
    writer.append("active/share", np.tile(np.array([0.5, 0.125], np.float16), num))
    return [own if is_alive else own[:0] for own, is_alive in zip(rows["window"], alive, strict=True)]


def _write_windows(writer: LatentsWriter, rng: Any, windows: int, vocabulary: int, window: int) -> None:
    """Windows that fill contexts of two documents; the last window of each context is short."""
    per_context = WINDOWS
    number = np.arange(windows)
    writer.append("windows/start", number * window)
    writer.append("windows/segment", (number % per_context) // (per_context // 2))
    tokens = rng.integers(1, vocabulary, (windows, window))
    tokens[per_context - 1 :: per_context, -3:] = layout.NONE
    tokens[:, 0] = np.where(number % per_context == 0, 0, tokens[:, 0])
    smile = np.array([1 + byte for byte in "😀".encode()])
    tokens[:, 5:9] = smile
    writer.append("windows/tokens", tokens)


def synthetic_weights(folder: Path, hashes: tuple[str, str], num_latents: int = 12) -> None:
    """Global weights in which latent 6, the first of layer 1, is fed by latent 5, the last of layer 0, and no other.

    The two layers are those of one dictionary, or of two, by the `hashes` of their weights.
    """
    F = num_latents
    writer = GlobalWeightsWriter(open_io(folder), 2)
    for direction, at, other in (("sources", 6, 5), ("targets", 5, 6)):
        held = np.full((F, 2), -1)
        held[at, 0] = other
        for name, dtype in COLUMNS.items():
            value = held if name == "latent" else np.where(held < 0, 0, -1.5 if dtype == "float32" else 3)
            writer.append(f"{direction}/{name}", value.astype(dtype))
    writer.append("fired", np.full(F, 7, np.uint32))
    layers = [
        {"layer": 0, "num_latents": 6, "first": 0, "sha256": hashes[0]},
        {"layer": 1, "num_latents": F - 6, "first": 6 * (hashes[0] == hashes[1]), "sha256": hashes[1]},
    ]
    whole = [{**one, "dictionary": "", "norm_factor": 1.0} for one in layers]
    writer.finish(WeightsMeta(layers=whole, most=2, tokens=100, store={}, model={}, versions={}))
