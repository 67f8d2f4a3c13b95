"""Format 3: which arrays a latents folder holds, their types and axes. `docs/latents.md` tells what they mean.

Axes: F latents, N example records, A active positions beside a record's peak, R windows, P pool windows, V vocabulary,
B its bytes; of a multimodal store's folder M pictures (one image of one document each), G their grids, S records of
pictures, C regions of these. The first axis is the one that is read by ranges; the others are written whole.
"""

from dataclasses import dataclass

FORMAT_VERSION = 1
META = "meta.json"
NOTES = "notes.sqlite"

BINS = 64  # of the histogram of activations
BINS_PER_OCTAVE = 3
LOGIT_BINS = 50  # of the histogram of logit weights
TOKENS = 16  # tokens listed per latent, of those it fires on and of those that follow
NEAREST = 20  # latents listed as near or as firing together
LOGITS = 20  # vocabulary entries listed at each end
NONE = -1  # index of a list's slot that is empty

# What the small columns are read and written in: all rows of most tables in one request.
COLUMN_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: its type as Zarr names it, its axes, and the rows that are compressed together."""

    dtype: str
    axes: tuple[str, ...]
    """Names of the axes; those behind the first are keys of ``meta.json``'s ``axes`` or numbers."""
    chunk_rows: int

    def row_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Shape of one row where the named axes have these sizes."""
        return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in self.axes[1:])


def _column(dtype: str, axis: str = "F") -> ArraySpec:
    return ArraySpec(dtype, (axis,), COLUMN_ROWS)


def _rows(dtype: str, width: str | int, rows: int = 256, axis: str = "F") -> ArraySpec:
    return ArraySpec(dtype, (axis, str(width)), rows)


KINDS = ("image", "text", "assistant")  # of tokens, in a folder of a multimodal store
COUNTS = ("fired", "windows", "contexts", "documents", "fired_train", "fired_heldout")
SUMS = ("sum1", "sum2", "sum3", "sum4")
WEIGHTS = ("encoder_norm", "decoder_norm", "encoder_decoder_cosine", "bias", "map_x", "map_y")
LOGIT_MOMENTS = ("logit_mean", "logit_sd", "logit_skew", "logit_kurtosis", "logit_low", "logit_high")

ARRAYS: dict[str, ArraySpec] = {
    **{f"table/{name}": _column("uint64") for name in COUNTS},
    **{f"table/{name}": _column("float64") for name in SUMS},
    "table/max": _column("float32"),
    **{f"table/fired_{kind}": _column("uint64") for kind in KINDS},
    **{f"table/{name}": _column("float32") for name in (*WEIGHTS, *LOGIT_MOMENTS)},
    "histogram": _rows("uint64", BINS, 64),
    "positions": _rows("uint64", "positions"),
    "tokens/sampled": _column("uint32"),
    "tokens/firing": _rows("int32", TOKENS),
    "tokens/firing_count": _rows("uint32", TOKENS),
    "tokens/next": _rows("int32", TOKENS),
    "tokens/next_count": _rows("uint32", TOKENS),
    "neighbours/latent": _rows("int32", NEAREST),
    "neighbours/cosine": _rows("float32", NEAREST),
    "together/fired": _column("uint32"),
    "together/jaccard_latent": _rows("int32", NEAREST),
    "together/jaccard": _rows("float32", NEAREST),
    "together/jaccard_count": _rows("uint32", NEAREST),
    "together/npmi_latent": _rows("int32", NEAREST),
    "together/npmi": _rows("float32", NEAREST),
    "together/npmi_count": _rows("uint32", NEAREST),
    "together/pearson_latent": _rows("int32", NEAREST),
    "together/pearson": _rows("float32", NEAREST),
    "logits/top": _rows("int32", LOGITS),
    "logits/top_value": _rows("float32", LOGITS),
    "logits/bottom": _rows("int32", LOGITS),
    "logits/bottom_value": _rows("float32", LOGITS),
    "logits/histogram": _rows("uint32", LOGIT_BINS),
    "examples/offsets": _column("uint64", "F+1"),
    "examples/top": _column("uint16"),
    "examples/active_offsets": _column("uint64", "F+1"),
    "examples/window": ArraySpec("uint32", ("N",), 4096),
    "examples/position": ArraySpec("uint16", ("N",), 4096),
    "examples/value": ArraySpec("float32", ("N",), 4096),
    "examples/active": ArraySpec("uint8", ("N",), 4096),
    "active/offset": ArraySpec("int8", ("A",), 16384),
    "active/share": ArraySpec("float16", ("A",), 16384),
    "windows/start": ArraySpec("uint64", ("R",), COLUMN_ROWS),
    "windows/segment": ArraySpec("int32", ("R",), COLUMN_ROWS),
    "windows/tokens": _rows("int32", "window", 64, "R"),
    "windows/kind": _rows("uint8", "window", 64, "R"),
    "windows/image": _rows("int32", "window", 64, "R"),
    "windows/cell": ArraySpec("int16", ("R", "window", "2"), 64),
    "seen/offsets": _column("uint64", "F+1"),
    "seen/region_offsets": _column("uint64", "F+1"),
    "seen/picture": ArraySpec("uint32", ("S",), 4096),
    "seen/value": ArraySpec("float32", ("S",), 4096),
    "seen/regions": ArraySpec("uint16", ("S",), 4096),
    "regions/grid": ArraySpec("uint32", ("C",), 16384),
    "regions/cell": ArraySpec("int16", ("C", "2"), 16384),
    "regions/share": ArraySpec("float16", ("C",), 16384),
    "pictures/place": ArraySpec("uint64", ("M",), 1024),
    "pictures/sha256": ArraySpec("uint8", ("M", "32"), 256),
    "pictures/thumbnail": ArraySpec("uint8", ("M", "32"), 256),
    "pictures/size": ArraySpec("uint32", ("M", "2"), 1024),
    "pictures/grids": ArraySpec("uint64", ("M+1",), 1024),
    "pictures/before": _rows("int32", "window", 64, "M"),
    "pictures/after": _rows("int32", "window", 64, "M"),
    "grids/row": ArraySpec("uint32", ("G",), 1024),
    "grids/shape": ArraySpec("uint16", ("G", "2"), 1024),
    "grids/place": ArraySpec("float64", ("G", "4"), 256),
    "silent/window": _column("uint32", "P"),
    "silent/offsets": _column("uint64", "F+1"),
    "silent/fired": ArraySpec("uint16", ("fired in the pool",), COLUMN_ROWS),
    "vocabulary/offsets": _column("uint32", "V+1"),
    "vocabulary/special": _column("bool", "V"),
    "vocabulary/bytes": _column("uint8", "B"),
}
# Sizes that ``meta.json`` must give: of the axes that the code does not know.
AXES = frozenset(axis for spec in ARRAYS.values() for axis in spec.axes[1:] if not axis.isdigit())
# Present where the folder was made of a multimodal store.
PICTURED = frozenset(name for name in ARRAYS if name.startswith(("seen/", "regions/", "pictures/", "grids/"))) | {
    "windows/kind",
    "windows/image",
    "windows/cell",
    *(f"table/fired_{kind}" for kind in KINDS),
}
# Present where the folder was made with a language model's head, or a tokenizer; and those.
OPTIONAL = (
    frozenset(name for name in ARRAYS if name.startswith(("logits/", "table/logit_", "vocabulary/", "neighbours/")))
    | {f"table/{name}" for name in WEIGHTS}
    | PICTURED
)
THUMBNAILS = "thumbnails"  # the folder of the pictures as they are shown, each under the SHA-256 of its bytes
