"""Commands that write, each ready to be run again and again on a disk that fails: `COMMANDS`, by name."""

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from shared.lm import model_identity
from shared.sae import SAE, SAEConfig
from shared.store import Store
from tests.cli import ForkServer
from tests.disk import Call, FailingDisk, check_failure, half_files, is_leftover, leftovers
from tests.inspection import small_sae, small_store
from tests.latents import synthetic_latents
from tests.tracing import bundled_transcoder

HARVEST = (
    "debug=tiny_harvest",
    "corpus=tokens",
    "corpus.contexts=4",
    "corpus.dtype=uint16",
    "packing.seq_len=32",
    "hooks.layers=0",
    "model.probe=false",
)
TRAIN = (
    "sae.d_latent=24",
    "sae.k=2",
    "sae.dead_after_tokens=400",
    "stream.batch_size=64",
    "schedule.tokens=500",
    "checkpoint.every=0.5",
    "logger.every=4",
    "logger.progress=false",
)
EVAL = ("contexts=1", "downstream=false", "hydra.output_subdir=null")
INSPECT = ("logits=false", "device=cpu", "latents.window=16", "latents.together_tokens=400", "latents.pool=12")
TRACE = ("ablations=0", "device.threads=1", "hydra.output_subdir=null", "prune.nodes=0.3")
# What a failure may be after: the result is whole and in its place, and only its flush, a line of the log or the
# removal of what is no longer needed is not.
SILENT = ("fsync", "write", "open", "remove")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Command:
    """A command, the folder it writes to, and what lies in that before."""

    def __init__(
        self,
        disk: FailingDisk,
        prepare: Callable[[Path], object] = lambda folder: None,
        *,
        one_result: tuple[str, ...] = (),
    ) -> None:
        """`one_result`: files that belong to one another, so that former ones are never beside new ones."""
        self.disk, self.prepare, self.one_result = disk, prepare, one_result
        self.fresh()
        self.before = self.result()
        done = disk.run()
        assert done.code == 0, done.stderr
        self.calls = disk.distinct_calls()
        self.names, self.after = names(disk.folder), self.result()
        assert leftovers(disk.folder) == []
        assert list(half_files(disk.folder)) == []

    def fresh(self) -> None:
        shutil.rmtree(self.disk.folder, ignore_errors=True)
        self.prepare(self.disk.folder)

    def result(self) -> dict[str, bytes]:
        places = [path for name in self.one_result for path in sorted(self.disk.folder.glob(name)) if path.is_file()]
        return {str(path.relative_to(self.disk.folder)): path.read_bytes() for path in places}

    def fail_and_run_again(self, call: Call, error: int) -> None:
        """From `call` on every call fails; the next run finds a disk that works."""
        self.fresh()
        folder = self.disk.folder
        result = self.disk.run(call.number, error)
        if result.code == 0:
            assert call.what in SILENT, call
            more = names(folder) - self.names
            assert all(any(map(is_leftover, Path(name).parts)) for name in more), (call, more)
        else:
            check_failure(result)
        assert list(half_files(folder)) == [], (call, list(half_files(folder)))
        if self.one_result:
            left = self.result()
            assert left.items() <= self.before.items() or left.items() <= self.after.items(), (call, *left)
        again = self.disk.run()
        if result.code == 0 and again.code == 2:
            assert "not empty" in again.error, call
            return
        assert again.code == 0, (call, again.stderr)
        assert leftovers(folder) == [], (call, leftovers(folder))
        assert names(folder) == self.names, call


class Bench:
    """What the commands read, made once, when a command needs it first; all of it on a disk that works."""

    def __init__(self, server: ForkServer, root: Path, planted_store: Callable[..., Store]) -> None:
        self.server, self.root, self._planted = server, root, planted_store
        self._count = 0

    def run(self, module: str, *arguments: str) -> None:
        done = self.server.at(self.root).run(module, *arguments)
        assert done.code == 0, done.stderr

    def disk(self, folder: Path, module: str, *arguments: object) -> FailingDisk:
        return FailingDisk(self.server.at(self.root), folder, module, *map(str, arguments))

    def folder(self) -> Path:
        """A place of its own for a command to write to, which `FailingDisk` empties."""
        self._count += 1
        return self.root / f"disk-{self._count}" / "run"

    @cached_property
    def ids(self) -> Path:
        np.arange(1, 1000, dtype=np.uint16).tofile(self.root / "ids.bin")
        return self.root / "ids.bin"

    @cached_property
    def store(self) -> Path:
        self._planted(self.root / "store")
        return self.root / "store"

    @cached_property
    def saes(self) -> Path:
        """Two, of different k, in a folder."""
        for k in (2, 3):
            where = [f"run_dir={self.root / 'trained'}", f"out_dir={self.root / f'saes/k{k}'}"]
            self.run("stage_train", *TRAIN, f"sae.k={k}", *where, f"store.url={self.store}")
        return self.root / "saes"

    @cached_property
    def plain(self) -> Path:
        SAE(SAEConfig(d_model=12, d_latent=24, k=2)).save_pretrained(self.root / "plain")
        return self.root / "plain"

    @cached_property
    def inspected(self) -> Path:
        """A store and a dictionary to inspect."""
        small_store(self.root / "inspected/store", num_contexts=9)
        small_sae(self.root / "inspected/sae")
        return self.root / "inspected"

    @cached_property
    def latents(self) -> Path:
        synthetic_latents(self.root / "run-of-latents/latents", 20)
        return self.root / "run-of-latents/latents"

    @cached_property
    def demo(self) -> Path:
        """A run of the bundled model, harvested, trained and inspected: many short documents, some of each half."""
        rows = [{"text": f"def number_{one}():\n    return {one} * {one}\n"} for one in range(40)]
        (self.root / "documents.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        text = ("corpus=jsonl", f"corpus.files={self.root / 'documents.jsonl'}", "corpus.contexts=8")
        small = ("name=demo", "hooks.layers=0", "packing.seq_len=32", "model.probe=false")
        self.run("stage_harvest", "debug=tiny_harvest", *text, *small)
        self.run("stage_train", *TRAIN, "name=demo")
        self.run("stage_inspect", *INSPECT, "name=demo")
        return self.root / "runs/demo"

    @cached_property
    def transcoders(self) -> Path:
        for layer in range(4):
            made = bundled_transcoder(layer)
            made.save_pretrained(self.root / f"tc/layer_{layer}", {"model": model_identity("bundled")})
        return self.root / "tc"


def harvest(bench: Bench, folder: Path) -> Command:
    return Command(bench.disk(folder, "stage_harvest", *HARVEST, f"corpus.files={bench.ids}", f"run_dir={folder}"))


def train(bench: Bench, folder: Path) -> Command:
    return Command(bench.disk(folder, "stage_train", *TRAIN, f"run_dir={folder}", f"store.url={bench.store}"))


def packed(bench: Bench, folder: Path) -> Command:
    """Two SAEs from one pass."""
    sweep = ("-m", "packed=true", "sae.k=2,3", f"run_dir={folder}", f"store.url={bench.store}")
    return Command(bench.disk(folder, "stage_train", *(one for one in TRAIN if "sae.k" not in one), *sweep))


def evaluate(bench: Bench, folder: Path) -> Command:
    disk = bench.disk(folder, "stage_eval", *EVAL, f"run_dir={folder}", f"store.url={bench.store}")
    return Command(disk, lambda place: shutil.copytree(bench.saes / "k2", place / "sae"))


def compare(bench: Bench, folder: Path) -> Command:
    """Several SAEs, and one page that compares them."""
    disk = bench.disk(
        folder, "stage_eval", *EVAL, f"run_dir={folder}", f"store.url={bench.store}", f"sae.path={folder}/saes"
    )
    return Command(disk, lambda place: shutil.copytree(bench.saes, place / "saes"))


def export(bench: Bench, folder: Path) -> Command:
    """The SAE of a run that has its training state alone."""

    def unexported(place: Path) -> None:
        shutil.copytree(bench.saes / "k2", place)
        (place / "config.json").unlink()
        (place / "sae.safetensors").unlink()

    return Command(bench.disk(folder, "stage_train.export", folder), unexported)


def converting(to: str) -> Callable[[Bench, Path], Command]:
    """As another format."""

    def convert(bench: Bench, folder: Path) -> Command:
        source = bench.transcoders if to == "circuit_tracer" else bench.plain
        return Command(bench.disk(folder, "shared.sae", "convert", source, folder / "out", "--to", to))

    return convert


def inspect(bench: Bench, folder: Path) -> Command:
    read = [f"store.url={bench.inspected / 'store'}", f"sae.path={bench.inspected / 'sae'}"]
    return Command(bench.disk(folder, "stage_inspect", *INSPECT, *read, f"run_dir={folder}"))


def exporting(to: str) -> Callable[[Bench, Path], Command]:
    """A latents folder as another project's files."""

    def export(bench: Bench, folder: Path) -> Command:
        more = ["--source", "2-granary-res"] if to == "neuronpedia" else []
        return Command(bench.disk(folder, "stage_inspect.export", bench.latents, folder / "out", "--to", to, *more))

    return export


def found(bench: Bench, folder: Path) -> Command:
    """Concepts, into the notes and into a file."""
    read = ["--store", bench.demo / "store", "--sae", bench.demo / "sae"]
    what = ["--regex", ".", "--split", "all", "--json", folder / "found.json"]
    disk = bench.disk(folder, "stage_inspect.find", folder / "latents", *read, *what)
    return Command(disk, lambda place: shutil.copytree(bench.demo / "latents", place / "latents"))


def notes(bench: Bench, folder: Path) -> Command:
    """Explanations from a file, into notes that are not there yet."""
    rows = [{"index": latent, "description": f"what {latent} does"} for latent in range(20)]
    (bench.root / "explanations.json").write_text(json.dumps(rows))
    disk = bench.disk(folder, "stage_inspect.explanations", folder, bench.root / "explanations.json")
    return Command(disk, lambda place: shutil.copytree(bench.latents, place))


def site(bench: Bench, folder: Path) -> Command:
    """Pages for a web host, in place of older ones."""
    synthetic_latents(bench.root / "other/latents", 9)
    bench.run("stage_inspect.explorer", str(bench.root / "other/latents"), "--folder", str(bench.root / "older-site"))
    disk = bench.disk(folder, "stage_inspect.explorer", bench.latents, "--folder", folder / "site")
    older = lambda place: shutil.copytree(bench.root / "older-site", place / "site")  # noqa: E731
    return Command(disk, older, one_result=("site/**/*",))


def first_site(bench: Bench, folder: Path) -> Command:
    """Pages for a web host, where nothing was."""
    return Command(bench.disk(folder, "stage_inspect.explorer", bench.latents, "--folder", folder / "site"))


def page(bench: Bench, folder: Path) -> Command:
    """One HTML file."""
    return Command(bench.disk(folder, "stage_inspect.explorer", bench.latents, "--html", folder / "latents.html"))


def trace(bench: Bench, folder: Path) -> Command:
    """A graph in place of that of another text."""
    common = ("stage_trace", str(bench.transcoders), *TRACE)
    older = bench.root / "older-graph"
    bench.run(*common, "text=class A:", f"out_dir={older}")
    return Command(
        bench.disk(folder, *common, "text=def f(x):", f"out_dir={folder}"),
        lambda place: shutil.copytree(older, place, ignore=shutil.ignore_patterns("*.log")),
        one_result=("graph*",),
    )


def drop(bench: Bench, folder: Path) -> Command:
    """What is damaged and what a killed harvest left, out of a store."""

    def damaged(place: Path) -> None:
        shutil.copytree(bench.store, place)
        shard = sorted(place.glob("layers/**/c/*/*/*"))[0]
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        shard.with_name(f".{shard.name}.tmp").write_bytes(b"half")

    return Command(bench.disk(folder, "shared.store", "drop-incomplete", "--damaged", folder), damaged)


FORMATS = ("granary", "saelens", "sparsify", "dictionary_learning", "opensae", "circuit_tracer")
EXPORTS = ("parquet", "neuronpedia", "saedashboard", "delphi")
COMMANDS: dict[str, Callable[[Bench, Path], Command]] = {
    **{one.__name__: one for one in (harvest, train, packed, evaluate, compare, export)},
    **{to: converting(to) for to in FORMATS},
    **{to: exporting(to) for to in EXPORTS},
    **{one.__name__: one for one in (inspect, found, notes, site, first_site, page, trace, drop)},
}


def reading(bench: Bench) -> list[tuple[str, ...]]:
    """Command lines that only look."""
    plan = ("stage_train.plan", *TRAIN, f"store.url={bench.store}")
    return [plan, *(("shared.store", look, str(bench.store)) for look in ("info", "ls", "verify"))]
