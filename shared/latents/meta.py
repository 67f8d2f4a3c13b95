"""``meta.json``: what a latents folder was made of. Written last, so a folder that has one is whole."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.latents.layout import FORMAT_VERSION, META
from shared.store.io.base import ObjectIO, ObjectMissingError


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
            record = json.loads(data)
            version = record["granary_latents"]
            if version == FORMAT_VERSION:
                found = cls(**{one.name: record[one.name] for one in fields(cls)})
                sizes = (found.num_latents, found.seq_len, found.together_tokens, *found.axes.values())
                if all(isinstance(size, int) and size >= 0 for size in sizes) and 0 < found.window <= 1024:
                    return found
        except (ValueError, KeyError, TypeError):
            version = None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise GranaryError(f"{io.url} has format {version}, this Granary reads up to {FORMAT_VERSION}: upgrade it")
        raise GranaryError(f"{META} of {io.url} is damaged or no latents folder's: run granary inspect again")
