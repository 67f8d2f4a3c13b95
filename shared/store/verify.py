"""Re-read a whole store, compare every bit with the commit records, and remove what does not belong.

A store is right when: its plan, its zarr.json files and its token objects are as recorded; every shard has a commit
record that passes its own checksum; every chunk and index of every object a record names matches it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256

from shared.basics.errors import GranaryError
from shared.store.added import AddedIO, additions
from shared.store.format import layout
from shared.store.format.extent import Extent, TokenRecord, put_same, read_extents
from shared.store.format.image_table import read_table
from shared.store.format.integrity import check_array_object, object_sha256
from shared.store.format.manifest import DamagedObjectError, ShardRecord, unseal
from shared.store.format.shard import ArrayRecord
from shared.store.io.base import ObjectIO
from shared.store.io.open import open_io
from shared.store.store import Store
from shared.store.window import Window, data_keys, is_window_key, object_check

VERIFY_THREADS = 4


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One object that is not what it must be. `shard` is -1 where it belongs to no shard."""

    shard: int
    key: str
    what: str


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found."""

    problems: list[Problem] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Planned shards without a commit record."""
    uncommitted: list[str] = field(default_factory=list)
    """Objects of shards without a commit record."""
    leftovers: list[str] = field(default_factory=list)
    """Temporary files of dead writers."""
    foreign: list[str] = field(default_factory=list)
    """Objects that are no part of the format."""
    num_objects: int = 0
    num_bytes: int = 0
    num_shards: int = 0
    passed: list[int] = field(default_factory=list)
    """Shards whose activations training has passed and deleted (store.window)."""
    additions: dict[str, "VerifyReport"] = field(default_factory=dict)
    """The same of the sites that were added later, by the addition's name; keys are as the addition has them."""

    @property
    def intact(self) -> bool:
        """True where nothing is damaged and nothing missing; an addition that has only begun is neither."""
        return not self.problems and not self.missing and not any(one.problems for one in self.additions.values())


Check = tuple[int, str, int, Callable[[], str | None]]  # shard or -1, key, bytes, what is wrong or None


def verify(url: str, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every object of the store at `url`.

    `progress(done, total)` is called with bytes. Raises GranaryError only where there is no store to check.
    """
    io = open_io(url)
    sizes = io.listing()
    if layout.extent_key(0) not in sizes and not any(key.startswith("manifest/") for key in sizes):
        Store.open(url)  # raises with the reason
        raise GranaryError(f"no activation store at {url}")
    report = VerifyReport(leftovers=io.leftovers())
    places = {place.name: place for place in additions(io, sizes)}
    report.additions = {name: VerifyReport() for name in places}
    checks, known, arrays = _checks(io, sizes, report)
    of_part = [(report, check) for check in checks]
    for name, place in places.items():
        found = report.additions[name]
        checks, named, own = _checks(place, place.view(sizes), found)
        of_part += [(found, check) for check in checks]
        known.update(map(place.real, named))
        arrays |= own
    total, done = sum(size for _, (_, _, size, _) in of_part), 0
    with ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="granary-verify") as pool:
        wrongs = pool.map(lambda one: one[1][3](), of_part)
        for (found, (shard, key, size, _)), wrong in zip(of_part, wrongs, strict=True):
            if wrong is not None:
                found.problems.append(Problem(shard, key, wrong))
            done += size
            if progress is not None:
                progress(done, total)
    for found in (report, *report.additions.values()):
        found.problems.sort()
    report.num_objects, report.num_bytes = len(of_part), total
    for key in sorted(sizes.keys() - known):
        (report.foreign if layout.shard_of_key(key, arrays) is None else report.uncommitted).append(key)
    return report


def _checks(io: ObjectIO, sizes: dict[str, int], report: VerifyReport) -> tuple[list[Check], set[str], set[str]]:
    """The checks of a store or of an addition, the keys that belong to it, and its arrays."""
    extents, problems = _readable_extents(io, sizes)
    report.problems += problems
    checks, known = _plan_checks(io, sizes, extents, report)
    if report.missing and isinstance(io, AddedIO) and layout.COMPLETE in sizes:
        report.problems += [Problem(shard, layout.manifest_key(shard), "is missing") for shard in report.missing]
    return checks, known, _arrays(extents)


def _readable_extents(io: ObjectIO, sizes: Iterable[str]) -> tuple[list[Extent], list[Problem]]:
    """The extents whose records are intact, in shard order, and what is wrong with the others."""
    extents: list[Extent] = []
    problems: list[Problem] = []
    for key in sorted(filter(_is_extent_key, sizes)):
        try:
            extents.append(Extent.from_bytes(io.get(key), key))
        except DamagedObjectError as error:
            problems.append(Problem(-1, key, str(error)))
    if layout.extent_key(0) not in sizes:
        problems.append(Problem(-1, layout.extent_key(0), "is missing"))
    return extents, problems


def _is_extent_key(key: str) -> bool:
    return key.startswith("extents/") and not key.endswith(".tokens.json")


def _arrays(extents: Iterable[Extent]) -> set[str]:
    """Zarr paths of the arrays whose objects belong to shards."""
    return {path for extent in extents for path in layout.shard_arrays(extent.plan)}


def _plan_checks(
    io: ObjectIO, sizes: dict[str, int], extents: list[Extent], report: VerifyReport
) -> tuple[list[Check], set[str]]:
    """All checks of large objects; reads the small ones (commit records) on the way."""
    checks: list[Check] = []
    known = set(filter(_is_extent_key, sizes))
    for extent in extents:
        checks += _token_checks(io, sizes, extent, report, known)
    documents = {key: text for extent in extents for key, text in extent.documents.items()}
    for key, text in documents.items():
        known.add(key)
        checks.append((-1, key, len(text), _bytes_check(io, key, text.encode())))
    passed = _window_checks(io, sizes, extents, report, checks, known)
    planned = {shard: extent for extent in extents for shard in _shards(extent, sizes)}
    report.num_shards = sum(extent.plan.num_shards for extent in extents)
    for shard in sorted(planned):
        key = layout.manifest_key(shard)
        known.add(key)
        if key not in sizes:
            report.missing.append(shard)
            continue
        try:
            plan = planned[shard].plan
            record = ShardRecord.from_bytes(io.get(key), key)
            record.check(plan, shard, planned[shard].contexts(shard), key)
        except DamagedObjectError as error:
            report.problems.append(Problem(shard, key, str(error)))
            continue
        slots = plan.shard_contexts * plan.chunks_per_context
        for path, array in record.arrays.items():
            if shard in passed and array.key in data_keys(record):
                if array.key in sizes:
                    report.leftovers.append(array.key)
                known.add(array.key)
                continue
            known.add(array.key)
            in_shards = None if layout.is_moments(path) else slots
            checks.append((shard, array.key, array.num_bytes, _array_check(io, array, in_shards)))
    known.add(layout.COMPLETE)
    if layout.COMPLETE in sizes:
        checks.append((-1, layout.COMPLETE, sizes[layout.COMPLETE], _complete_check(io, report)))
    return checks, known


def _shards(extent: Extent, sizes: Mapping[str, int]) -> Iterable[int]:
    """Those of an extent; of one whose token record is missing or too small for them, those that are committed."""
    shards = range(extent.first_shard, extent.end_shard)
    if sizes.get(layout.extent_tokens_key(extent.first_shard), 0) >= extent.least_record_bytes:
        return shards
    return sorted(shard for key in sizes if (shard := layout.shard_of_manifest(key)) is not None and shard in shards)


def _window_checks(
    io: ObjectIO,
    sizes: dict[str, int],
    extents: list[Extent],
    report: VerifyReport,
    checks: list[Check],
    known: set[str],
) -> frozenset[int]:
    """Check what lies under ``window/``; returns the shards whose activations need not be there."""
    keys = [key for key in sizes if is_window_key(key)]
    known.update(keys)
    bad = {key: wrong for key in keys if (wrong := object_check(key, io.get(key))) is not None}
    report.problems += [Problem(-1, key, wrong) for key, wrong in bad.items()]
    if bad or not extents or (window := Window.find(io, extents[0].plan)) is None:
        return frozenset()
    passed = window.passed_shards(extents[0].heldout)
    report.passed = sorted(passed)
    return passed


def _token_keys(extent: Extent, sizes: Iterable[str]) -> list[str]:
    """Of `sizes` the keys of what the extent wrote before any activation, but for files of images."""
    shards = range(extent.first_shard, extent.end_shard)
    arrays = extent.plan.token_arrays
    by_ndim = {
        n: [name for name, one in arrays.items() if one.ndim == n] for n in {one.ndim for one in arrays.values()}
    }

    def is_own(key: str) -> bool:
        found = [layout.shard_of_key(key, names, n) for n, names in by_ndim.items()]
        found += [layout.shard_of_image_table(key)] if extent.plan.has_images else []
        return any(shard is not None and shard in shards for shard in found)  # None would be looked for one by one

    return [key for key in sizes if is_own(key)]


def _token_checks(
    io: ObjectIO, sizes: Collection[str], extent: Extent, report: VerifyReport, known: set[str]
) -> Iterator[Check]:
    key = layout.extent_tokens_key(extent.first_shard)
    known.add(key)
    shards = range(extent.first_shard, extent.end_shard)
    known.update(_token_keys(extent, sizes))
    if key not in sizes:
        report.problems.append(Problem(-1, key, "is missing: the harvest was stopped while it wrote its tokens"))
        return
    try:
        record = TokenRecord.from_bytes(io.get(key), key, extent)
    except DamagedObjectError as error:
        report.problems.append(Problem(-1, key, str(error)))
        return
    if any(len(sizes) != len(shards) for part in (record.sizes, record.sha256) for sizes in part.values()):
        report.problems.append(Problem(-1, key, f"is not of {len(shards):,} shards"))
        return
    for name, token_sizes in record.sizes.items():
        for shard, num_bytes, digest in zip(shards, token_sizes, record.sha256[name], strict=True):
            if name == layout.IMAGES:
                token_key = layout.image_table_key(shard)
                yield from _image_checks(io, shard, token_key, known)
            else:
                token_key = layout.object_key(name, shard, extent.plan.token_arrays[name].ndim)
            yield shard, token_key, num_bytes, _sha256_check(io, token_key, num_bytes, digest)


def _image_checks(io: ObjectIO, shard: int, key: str, known: set[str]) -> Iterator[Check]:
    """Of the files of images that a part of the table names, those no other part has named; none of a damaged part."""
    try:
        rows = read_table(io.get(key), key)
    except GranaryError:
        return  # its own check says so
    for digest in dict.fromkeys(row.sha256 for row in rows):
        file = layout.image_file_key(digest)
        if file not in known:
            known.add(file)
            size = io.size(file)
            yield shard, file, size or 0, _sha256_check(io, file, size or 0, digest)


def _bytes_check(io: ObjectIO, key: str, data: bytes) -> Callable[[], str | None]:
    return _sha256_check(io, key, len(data), sha256(data).hexdigest())


def _sha256_check(io: ObjectIO, key: str, num_bytes: int, digest: str) -> Callable[[], str | None]:
    def check() -> str | None:
        size = io.size(key)
        if size is None:
            return "is missing"
        if size != num_bytes:
            return f"has {size} bytes instead of {num_bytes}"
        try:
            return None if object_sha256(io, key, size) == digest else "fails its checksum"
        except GranaryError as error:
            return f"cannot be read: {error}"

    return check


def _array_check(io: ObjectIO, array: ArrayRecord, num_slots: int | None) -> Callable[[], str | None]:
    return lambda: check_array_object(io, array, num_slots)


def _complete_check(io: ObjectIO, report: VerifyReport) -> Callable[[], str | None]:
    def check() -> str | None:
        try:
            unseal(io.get(layout.COMPLETE), layout.COMPLETE)
        except DamagedObjectError as error:
            return str(error)
        if any(problem.key.startswith(("manifest/", "extents/")) for problem in report.problems) or report.missing:
            return None  # those are reported; the digest cannot be computed
        try:
            store = Store.open(io)
            summary = store.summary()
            digest = store.digest(range(summary["shards"]))
        except GranaryError as error:
            return f"cannot be compared: {error}"
        return (
            None if digest == summary.get("digest") else "has another digest than the commit records it was written for"
        )

    return check


def drop_incomplete(url: str, report: VerifyReport | None = None) -> list[str]:
    """Delete what no commit record names; with a `report` of `verify`, also take back what it found damaged.

    Returns the keys deleted. A damaged shard loses its commit record first, then its objects, and the next harvest
    makes it again; damaged tokens and metadata are written again by the next harvest too. Raises GranaryError while a
    harvest on this machine has the store open.
    """
    io = open_io(url)
    sizes = io.listing()
    if not any(key.startswith("extents/") for key in sizes):
        Store.open(url)  # raises with the reason
    if not io.claim(exclusive=True):
        raise GranaryError(f"a harvest is writing to {url}: stop it first")
    dropped = []
    # The additions first: what is wrong with the tokens is wrong with theirs too.
    for place in additions(io, sizes):
        found = None if report is None else report.additions.get(place.name)
        dropped += [place.real(key) for key in _drop(place, place.view(sizes), found)]
    dropped += _drop(io, sizes, report)
    leftovers = io.leftovers()
    _delete(io, leftovers)
    return list(dict.fromkeys(dropped + leftovers))


def _drop(io: ObjectIO, sizes: dict[str, int], report: VerifyReport | None) -> list[str]:
    """`drop_incomplete` of the store itself, or of an addition to it; returns the keys that were there."""
    arrays = _arrays(_readable_extents(io, sizes)[0])
    doomed: list[str] = []
    if report is not None and report.problems:
        doomed.append(layout.COMPLETE)
        token_records = [key for key in sizes if key.endswith(".tokens.json")]
        for problem in report.problems:
            if problem.shard >= 0 and not layout.is_written_first(problem.key):
                doomed.append(layout.manifest_key(problem.shard))
            else:  # what `create` writes: without the token record it looks at each object again
                doomed += token_records
                doomed.append(problem.key)
    _delete(io, doomed)
    unfinished = _drop_unfinished_extensions(io, sizes.keys() - set(doomed))
    _delete(io, unfinished)
    doomed += unfinished
    committed = {key for key in sizes if key.startswith("manifest/")} - set(doomed)
    orphans = [
        key
        for key in sizes
        if (shard := layout.shard_of_key(key, arrays)) is not None and layout.manifest_key(shard) not in committed
    ]
    if any(is_window_key(key) for key in sizes):
        store = Store.open(io)
        records = store.committed()
        orphans += [key for shard in store.passed_shards() for key in data_keys(records[shard]) if key in sizes]
    _delete(io, orphans)
    return [key for key in dict.fromkeys(doomed + orphans) if key in sizes]


def _drop_unfinished_extensions(io: ObjectIO, existing: set[str]) -> list[str]:
    """Keys of extensions whose tokens were never finished; puts back the metadata from before them."""
    extents = read_extents(io)
    finished = [extent for extent in extents if layout.extent_tokens_key(extent.first_shard) in existing]
    unfinished = [extent for extent in extents if extent.first_shard > 0 and extent not in finished]
    if not unfinished or not finished:
        return []
    for key, text in finished[-1].documents.items():
        put_same(io, key, text.encode(), replace=True)
    keys = [layout.extent_key(extent.first_shard) for extent in unfinished]
    for extent in unfinished:
        keys += _token_keys(extent, existing)
    return keys


def _delete(io: ObjectIO, keys: list[str]) -> None:
    for key in dict.fromkeys(keys):
        io.delete(key)
