"""All that one part of the store tells of the latents: filled batch by batch, then written in blocks of latents.

Sums of floats run batch after batch within a part, and parts are added in their order; so the result is the same
whoever did which part when. Everything else is counts, and records chosen by keys.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.hashes import limit, mix, seeded
from shared.latents.layout import BINS, KINDS, SUMS
from stage_inspect.scan.keep import Keys, Smallest
from stage_inspect.scan.log import RECORDS, Columns, Log, sort_by_latent, split, window_records
from stage_inspect.scan.pairs import Ints, Pairs, bins, falling, lengths, peaks, starts_of
from stage_inspect.scan.pictures import Shown, firing, picture_records
from stage_inspect.scan.places import Places, position_edges
from stage_inspect.scan.settings import Settings

SAMPLE, TOKENS, TOGETHER, POOL = range(4)  # purposes of chance
FIRED = ("fired", "windows", "contexts", "documents", "fired_heldout")
LOG_BYTES = 512 << 20  # of a log, before what can't be wanted any more is let go
LATENTS_PER_BLOCK = 8192


class Wanted:
    """What a process knows of the keys that still count; it lasts from part to part."""

    def __init__(self, num_latents: int, settings: Settings, *, pictures: bool = False) -> None:
        """`pictures`: the store is multimodal, and each latent's strongest pictures count too."""
        self.top = Smallest(num_latents, settings.top)
        self.pictures = Smallest(num_latents, settings.top) if pictures else None
        self.sample = Smallest(num_latents, settings.sample)
        self.tokens = Smallest(num_latents, settings.token_sample)


class Chance:
    """The random numbers of the pass; each is a function of the seed and of what it is for."""

    def __init__(self, num_latents: int, settings: Settings) -> None:
        latents = np.arange(num_latents)
        self.seed = settings.seed
        self._of_latent = {purpose: seeded(settings.seed, 10 + purpose, latents) for purpose in (SAMPLE, TOKENS)}

    def pair(self, purpose: int, latent: Ints, place_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Key of (latent, place), uint64; `place_hash` is `place` of the same purpose."""
        return mix(self._of_latent[purpose][latent] ^ place_hash)

    def place(self, purpose: int, places: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """Key of a place in the store."""
        return seeded(self.seed, purpose, places)


class PartState:
    """Counts, sums and records of one part."""

    def __init__(
        self, num_latents: int, seq_len: int, settings: Settings, wanted: Wanted, together: float, pool: float
    ) -> None:
        """`together`, `pool`: the shares of all tokens and of all windows that are sampled."""
        self.num_latents, self.settings, self.wanted = num_latents, settings, wanted
        self.chance = Chance(num_latents, settings)
        self.edges = np.array(position_edges(seq_len))
        self._together, self._pool = limit(together), limit(pool)
        self.counts = {name: np.zeros(num_latents, np.int64) for name in FIRED}
        self.sums = np.zeros((num_latents, len(SUMS)))
        self.largest = np.full(num_latents, -np.inf, np.float32)
        self.histogram = np.zeros((num_latents, BINS), np.uint32)
        self.positions = np.zeros((num_latents, len(self.edges)), np.uint32)
        self.logs = {name: Log() for name in RECORDS if getattr(wanted, name) is not None}
        self.totals = dict.fromkeys(("tokens", "tokens_heldout", "contexts", "documents", "windows"), 0)
        if wanted.pictures is not None:
            self.counts |= {f"fired_{kind}": np.zeros(num_latents, np.int64) for kind in KINDS}
            self.totals |= {f"tokens_{kind}": 0 for kind in KINDS}
        self.tokens_by_position = np.zeros(len(self.edges), np.int64)
        self._together_parts: list[Columns] = []
        self._pool_windows: list[npt.NDArray[Any]] = []
        self._pool_pairs: list[Columns] = []

    def add(
        self,
        places: Places,
        at_N: Ints,
        indices_NK: Ints,
        values_NK: npt.NDArray[np.float32],
        heldout: bool,
        shown: Shown | None = None,
    ) -> None:
        """A batch: sparse latents of the trainable positions `at_N`, ascending; `shown` of a multimodal store."""
        self._count_places(places, at_N, heldout)
        if shown is not None:
            for kind in KINDS:
                self.totals[f"tokens_{kind}"] += int(shown.of_kind(kind, at_N).sum())
        self._add_together(places, at_N, indices_NK, values_NK)
        pairs = Pairs.of(at_N, indices_NK, values_NK, self.num_latents)
        if not len(pairs.latent):
            return
        self._add_sums(pairs, places, heldout)
        if shown is not None:
            self._add_pictures(pairs, places, shown)
        self._add_records(pairs, places)

    def blocks(self) -> list[Columns]:
        """Everything that belongs to latents, in blocks of `LATENTS_PER_BLOCK`; the records are given away."""
        self._let_go()
        edges = np.minimum(np.arange(0, self.num_latents + LATENTS_PER_BLOCK, LATENTS_PER_BLOCK), self.num_latents)
        edges = np.unique(edges)
        logs = {
            name: split(sort_by_latent(log.pop(), self.num_latents), edges, RECORDS[name])
            for name, log in self.logs.items()
        }
        found = []
        for block, (start, stop) in enumerate(pairwise(edges)):
            rows = slice(start, stop)
            columns: Columns = {f"count/{name}": count[rows].astype(np.uint32) for name, count in self.counts.items()}
            columns |= {
                "sums": self.sums[rows],
                "max": self.largest[rows],
                "histogram": self.histogram[rows],
                "positions": self.positions[rows],
            }
            for name, parts in logs.items():
                columns |= {f"{name}/{column}": values for column, values in parts[block].items()}
            found.append(columns)
        return found

    def whole(self) -> Columns:
        """What belongs to no one latent: totals, the sampled tokens, the windows of the pool."""
        together: Columns = {
            name: np.concatenate([np.empty(0, dtype), *(part[name] for part in self._together_parts)])
            for name, dtype in (("count", np.uint32), ("latent", np.uint32), ("value", np.float32))
        }
        pairs: Columns = {
            name: np.concatenate([np.empty(0, dtype), *(part[name] for part in self._pool_pairs)])
            for name, dtype in (("window", np.uint64), ("latent", np.uint32))
        }
        return {
            **{f"total/{name}": np.array(total) for name, total in self.totals.items()},
            "tokens_by_position": self.tokens_by_position,
            **{f"together/{name}": column for name, column in together.items()},
            "pool/place": np.concatenate([np.empty(0, np.uint64), *self._pool_windows]),
            **{f"pool/{name}": column for name, column in pairs.items()},
        }

    def _count_places(self, places: Places, at_N: Ints, heldout: bool) -> None:
        self.totals["tokens"] += len(at_N)
        self.totals["tokens_heldout"] += len(at_N) * heldout
        self.totals["contexts"] += len(np.unique(at_N // places.seq_len))
        self.totals["documents"] += len(np.unique(places.document_P[at_N]))
        windows, trained = np.unique(places.window_P[at_N], return_counts=True)
        self.totals["windows"] += len(windows)
        group = np.searchsorted(self.edges, places.number_P[at_N], side="right") - 1
        self.tokens_by_position += np.bincount(group, minlength=len(self.edges))
        whole = windows[2 * trained >= self.settings.window]
        place = places.place_P[whole]
        self._pool_windows.append(place[self.chance.place(POOL, place) < self._pool].astype(np.uint64))

    def _add_together(self, places: Places, at_N: Ints, indices_NK: Ints, values_NK: npt.NDArray[np.float32]) -> None:
        chosen = self.chance.place(TOGETHER, places.place_P[at_N]) < self._together
        fired = indices_NK[chosen] >= 0
        self._together_parts.append(
            {
                "count": fired.sum(1).astype(np.uint32),
                "latent": indices_NK[chosen][fired].astype(np.uint32),
                "value": values_NK[chosen][fired],
            }
        )

    def _add_sums(self, pairs: Pairs, places: Places, heldout: bool) -> None:
        starts = starts_of(pairs.latent)
        latent = pairs.latent[starts]
        fired = lengths(starts, len(pairs.latent))
        self.counts["fired"][latent] += fired
        self.counts["fired_heldout"][latent] += fired * heldout
        self.largest[latent] = np.maximum(self.largest[latent], np.maximum.reduceat(pairs.value, starts))
        value = pairs.value.astype(np.float64)
        power = value.copy()
        for number in range(len(SUMS)):
            self.sums[latent, number] += np.add.reduceat(power, starts)
            power *= value
        bin_of = bins(pairs.value, self.settings.origin)
        np.add.at(self.histogram.reshape(-1), pairs.latent * BINS + bin_of, np.uint32(1))
        group = np.searchsorted(self.edges, places.number_P, side="right") - 1
        np.add.at(self.positions.reshape(-1), pairs.latent * len(self.edges) + group[pairs.at], np.uint32(1))

    def _add_pictures(self, pairs: Pairs, places: Places, shown: Shown) -> None:
        for kind in KINDS:
            self._count(f"fired_{kind}", pairs.latent[shown.of_kind(kind, pairs.at)])
        found, smallest = firing(pairs, shown), self.wanted.pictures
        assert smallest is not None
        latent, key = found.pairs.latent[found.peak], falling(found.pairs.value[found.peak])
        chosen = smallest.wanted(latent, key)
        if chosen.any():
            smallest.add(latent[chosen], key[chosen])
            self.logs["pictures"].add(picture_records(found, chosen, places, shown))

    def _add_records(self, pairs: Pairs, places: Places) -> None:
        wanted = self.wanted
        window = places.window_P[pairs.at]
        starts = starts_of(pairs.latent, window)
        peak = peaks(pairs.value, starts)
        latent = pairs.latent[starts]
        self._count("windows", latent)
        hashes = self.chance.place(SAMPLE, places.place_P)
        key = high(self.chance.pair(SAMPLE, latent, hashes[window[starts]]))
        self._log("sample", wanted.sample, pairs, places, peak, key)
        # Windows lie within documents and these within contexts, so each step goes on from the one before.
        value, at = pairs.value[peak], pairs.at[peak]
        runs = starts_of(latent, places.document_P[at])
        peak, latent = peak[peaks(value, runs)], latent[runs]
        self._count("documents", latent)
        self._log("top", wanted.top, pairs, places, peak, falling(pairs.value[peak]))
        self._count("contexts", latent[starts_of(latent, pairs.at[peak] // places.seq_len)])
        hashes = self.chance.place(TOKENS, places.place_P)
        key = high(self.chance.pair(TOKENS, pairs.latent, hashes[pairs.at]))
        chosen = np.flatnonzero(wanted.tokens.wanted(pairs.latent, key))
        latent, at = pairs.latent[chosen], pairs.at[chosen]
        wanted.tokens.add(latent, key[chosen])
        self.logs["tokens"].add(
            {
                "latent": latent.astype(np.uint32),
                "place": places.place_P[at].astype(np.uint64),
                "token": places.tokens_P[at].astype(np.int32),
                "next": places.next_P[at].astype(np.int32),
            }
        )
        in_pool = self.chance.place(POOL, places.place_P) < self._pool
        chosen = starts[in_pool[window[starts]]]
        self._pool_pairs.append(
            {
                "window": places.place_P[window[chosen]].astype(np.uint64),
                "latent": pairs.latent[chosen].astype(np.uint32),
            }
        )
        if sum(log.num_bytes for log in self.logs.values()) > LOG_BYTES:
            self._let_go()

    def _count(self, name: str, latent: Ints) -> None:
        starts = starts_of(latent)
        self.counts[name][latent[starts]] += lengths(starts, len(latent))

    def _log(self, name: str, smallest: Smallest, pairs: Pairs, places: Places, peak: Ints, key: Keys) -> None:
        chosen = smallest.wanted(pairs.latent[peak], key)
        peak = peak[chosen]
        if len(peak):
            smallest.add(pairs.latent[peak], key[chosen])
            self.logs[name].add(window_records(pairs, places, peak, self.settings.before, self.settings.after))

    def _let_go(self) -> None:
        """Drop records that later ones have made superfluous."""
        for name, log in self.logs.items():
            smallest: Smallest = getattr(self.wanted, name)
            smallest.update()
            columns = log.columns()
            if columns:
                log.keep(smallest.wanted(columns["latent"].astype(np.int64), high_keys(name, columns, self.chance)))


def high(key: npt.NDArray[np.uint64]) -> Keys:
    """The upper half of each key, by which records are let go."""
    return (key >> np.uint64(32)).astype(np.uint32)


def full_keys(name: str, columns: Columns, chance: Chance) -> npt.NDArray[np.uint64]:
    """Keys by which records are ordered, the smallest first; then by place."""
    latent, place = columns["latent"].astype(np.int64), columns["place"]
    if name in ("top", "pictures"):
        return falling(columns["value"]).astype(np.uint64) << np.uint64(32)
    if name == "sample":
        return chance.pair(SAMPLE, latent, chance.place(SAMPLE, place - columns["back"]))
    return chance.pair(TOKENS, latent, chance.place(TOKENS, place))


def high_keys(name: str, columns: Columns, chance: Chance) -> Keys:
    """Upper halves of `full_keys`."""
    return high(full_keys(name, columns, chance))
