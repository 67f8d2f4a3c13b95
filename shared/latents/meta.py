"""``meta.json``: what a latents folder was made of. Written last, so a folder that has one is whole."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from shared.basics.documents import parse_json, typed_at, typed_fields
from shared.basics.errors import GranaryError
from shared.latents.layout import AXES, FORMAT_VERSION, META
from shared.store.io.base import ObjectIO, ObjectMissingError

MOST = 2**48
LONGEST_WINDOW = 1024
# What readers take from the parts that are plain JSON.
PARTS: dict[str, Any] = {
    "dictionary.sha256": str,
    "dictionary.reads": list[str],
    "dictionary.writes": list[str],
    "store.url": str,
    "store.digest": str,
    "counts.tokens": int,
    "counts.contexts": int,
    "settings.before": int,
    "settings.after": int,
    "settings.seed": int,
}


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Facts of the whole folder. Counts are of trainable positions unless they say otherwise."""

    num_latents: int
    dictionary: dict[str, Any]
    """path, sha256 of its weights, kind, reads, writes, activation."""
    store: dict[str, Any]
    """url, digest, split, shards used."""
    model: dict[str, Any]
    """id, revision, path, dtype of the harvested language model, where the store records it."""
    tokenizer: dict[str, Any]
    """hash and what else the store records of it."""
    counts: dict[str, Any]
    """tokens, tokens_train, tokens_heldout, contexts, documents, windows, tokens_by_position; dead latents."""
    settings: dict[str, Any]
    """window, before, after, top, sample, seed and the other settings that decide the content."""
    position_edges: list[int]
    """First position of each group of positions, as the model numbers them."""
    histogram_origin: int
    """log2 of the lower edge of the histogram's bin 1; each octave has three bins. Bin 0 holds all below, zero and
    negative values too, the last bin all above."""
    together_tokens: int
    """Tokens of the sample behind ``together/``."""
    seq_len: int
    axes: dict[str, int]
    """Sizes of the arrays' named axes."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.axes["window"]

    def to_bytes(self) -> bytes:
        """JSON for people too."""
        return (
            json.dumps({"granary_latents": FORMAT_VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"
        ).encode()

    @classmethod
    def read(cls, io: ObjectIO) -> Self:
        """Raises GranaryError where there is no finished latents folder, or one of a newer format."""
        try:
            data = io.get(META)
        except ObjectMissingError:
            raise GranaryError(
                f"no latents folder at {io.url}: make one with granary inspect, or let the one that makes it finish"
            ) from None
        try:
            record = parse_json(data, META)
            version = typed_at(record, "granary_latents", int, META)
            found = cls(**typed_fields(cls, record, META)) if version == FORMAT_VERSION else None
            for keys, hint in PARTS.items() if found is not None else ():
                typed_at(record, keys, hint, META)
        except GranaryError as error:
            raise GranaryError(
                f"{io.url} is damaged or no latents folder ({error}): run granary inspect again"
            ) from None
        if version > FORMAT_VERSION:
            raise GranaryError(f"{io.url} has format {version}, this Granary reads up to {FORMAT_VERSION}: upgrade it")
        if found is not None:
            sizes = (found.num_latents, found.seq_len, found.together_tokens, *found.axes.values())
            window = found.axes.get("window", 0)
            has_axes = all(found.axes.get(axis, 0) > 0 for axis in AXES)
            beside = (found.settings["before"], found.settings["after"])
            beside_fits = all(0 <= one < window <= LONGEST_WINDOW for one in beside)
            if has_axes and beside_fits and all(0 <= size < MOST for size in sizes):
                return found
        raise GranaryError(f"{META} of {io.url} is damaged or no latents folder's: run granary inspect again")
