"""Held-out FVU and dead latents of TopK SAEs and transcoders: this project against its peers, at equal tokens.

    python benchmarks/quality.py [--quick] [--peers-python .venv-peers/bin/python] [--model bundled|stories260K ...]
    python benchmarks/quality.py --kind transcoder skip_transcoder     # against sparsify, which alone trains them

Each seed: this project trains by its own command line at its defaults; the batches it saw are then dumped in that
order, and every peer trains on them, at its defaults and over a grid of learning rates and two schedules (first seed;
the best then on all seeds). All are scored by one formula on the same held-out tokens. The held-out contexts are cut
in two: the peers' settings are chosen on the first half (validation), every figure of the table is of the second
(test). Activations are real: the bundled LLaMA on the standard library, and stories260K on TinyStories where
``../shared/realdata`` exists.

With --work a run that was stopped goes on: a finished row is kept where its configuration is the same. After a change
of code, empty that folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from quality_peers import CONTENDERS, EARLY, TRANSCODER_TRAINERS, Sides, score_all
from records import print_result

from shared.launch.allocator import as_environment
from shared.parallel import World
from shared.sae.loading import load
from shared.store import Store
from stage_train.data.stores import pin
from stage_train.data.stream import StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.length import stream_length

ROOT = Path(__file__).resolve().parent.parent
REALDATA = Path(os.environ.get("GRANARY_REALDATA", ROOT.parent / "shared" / "realdata"))
# Rates for the peers: the middle two are tried, then the neighbours of the best until they are worse.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2)
MIDDLE = slice(2, 4)
# Shares of their runs for warm-up and decay; the second are our own defaults.
LENGTHS = ((0.2, 0.2), (0.1, 0.4))
SEEDS = (0, 1, 2)
HALVES = ("validation", "test")
# Of a transcoder; the MLP of the layer whose stream an SAE reads.
READS, WRITES = "layers.2.mlp_in", "layers.2.mlp_out"
KINDS = ("sae", "transcoder", "skip_transcoder")
# What rows of one recipe have in common.
GROUP = ("model", "kind", "provider", "lr", "warmup", "decay")
SETTINGS: dict[str, dict[str, Any]] = {
    "bundled": {"k": 32, "expansion": 16, "harvest": []},
    "stories260K": {
        "k": 16,
        "expansion": 8,
        "harvest": [
            f"model={REALDATA / 'stories260K-hf'}", "corpus=text", "corpus.contexts=8000", "packing.seq_len=512",
            f"corpus.files={REALDATA / 'text' / 'tinystories_train.txt'}", "corpus.separator='<|endoftext|>'",
            "hooks.layers=2", "store.shard_contexts=50", "store.heldout_fraction=0.0125",
        ],
    },
}  # fmt: skip


def run(command: list[str], log: Path) -> None:
    """Run a command of this project or a peer; its output goes to `log`."""
    # What our stages ask for by themselves is as good for the peers.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **as_environment()}
    with log.open("a") as out:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False).returncode
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}: see {log}")


@dataclass(frozen=True)
class Training:
    """Who trained, how, and from which seed."""

    provider: str
    lr: float | None
    """None: the provider's own recipe."""
    lengths: tuple[float, float] | None
    """Shares of warm-up and decay."""
    seed: int

    @property
    def recipe(self) -> dict[str, Any]:
        """As columns of a row."""
        if self.lr is None or self.lengths is None:
            return {"lr": "default", "warmup": "default", "decay": "default"}
        return {"lr": self.lr, "warmup": self.lengths[0], "decay": self.lengths[1]}


class Bench:
    """One model's store, and everything trained on it."""

    def __init__(self, name: str, kind: str, options: argparse.Namespace) -> None:
        self.name, self.kind, self.options = name, kind, options
        self.settings = SETTINGS[name]
        self.parts = HALVES
        """Of the store's tokens, those that are scored."""
        self.folder = Path(options.work) / (name if kind == "sae" else f"{name}-mlp")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = self.folder
        """Where runs and finished rows are kept."""
        self.provider = "granary"
        """What rows of this project's runs are called."""
        self.log = self.folder / "log.txt"
        self.results: list[dict[str, Any]] = []
        self.threads = f"device.threads={options.threads}"

    def harvest(self) -> None:
        """The store, unless it is there."""
        extra = ["corpus.contexts=40", "store.shard_contexts=8"] if self.options.quick else []
        command = [sys.executable, "-m", "stage_harvest", f"run_dir={self.folder}", self.threads]
        sites = [] if self.kind == "sae" else ["hooks.sites=[mlp_in,mlp_out]"]
        run([*command, *self.settings["harvest"], *sites, *extra], self.log)

    @property
    def sites(self) -> tuple[str, str]:
        """What is read and what must be produced."""
        if self.kind == "sae":
            (hook,) = Store.open(str(self.folder / "store")).hooks
            return hook, hook
        return READS, WRITES

    def files(self, part: str) -> list[str]:
        """Files of both sides of one of the `parts`."""
        return [str(self.folder / f"{part}-{site}.npy") for site in self.sites]

    def training(self, seed: int) -> tuple[list[str], Path]:
        """The command that trains this project's dictionary, and the run's folder."""
        out = self.rows / f"{self.provider}-{self.kind}-{seed}"
        places = [] if self.kind == "sae" else [f"variant={self.kind}", f"reads={READS}", f"writes={WRITES}"]
        command = [
            sys.executable, "-m", "stage_train", f"run_dir={self.folder}", f"hydra.run.dir={out}", f"seed={seed}",
            f"sae.k={self.settings['k']}", f"sae.expansion={self.settings['expansion']}", self.threads,
            f"schedule.tokens={self.options.tokens}", "checkpoint.resume=never", *places,
        ]  # fmt: skip
        return command, out

    def job(self, seed: int) -> str:
        """The whole configuration of this project's run, as YAML."""
        command, _ = self.training(seed)
        return subprocess.run([*command, "--cfg", "job"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def ours(self, seed: int) -> None:
        """Train by the command line and score."""
        command, out = self.training(seed)
        job = {"config": self.job(seed), "heldout": self.options.heldout}

        def train() -> dict[str, float]:
            start = time.perf_counter()
            run(command, self.log)
            seconds = time.perf_counter() - start
            dictionary = load(out)

            def reconstruct(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                latents = dictionary.encode(x_ND)
                fired_F = torch.zeros(dictionary.config.d_latent, dtype=torch.bool)
                fired_F[latents.indices[latents.indices >= 0]] = True
                return dictionary.decode(latents), fired_F

            scored = {part: self.sides(part) for part in self.parts}
            return {**score_all(reconstruct, scored, 2048), "seconds": seconds}

        self.row(Training(self.provider, None, None, seed), job, train)

    def sides(self, part: str) -> Sides:
        """What ``dump`` wrote."""
        x_ND, y_ND = (torch.from_numpy(np.load(path)) for path in self.files(part))
        return x_ND, y_ND

    def dump_heldout(self) -> None:
        """Held-out tokens: of the first half of the contexts, and of the second."""
        contexts = Store.open(str(self.folder / "store")).contexts("heldout")
        middle = len(contexts) // 2
        for half, chosen in zip(HALVES, (contexts[:middle], contexts[middle:]), strict=True):
            self.dump(half, chosen, self.options.heldout)

    def dump(self, part: str, contexts: np.ndarray, tokens: int) -> None:
        """The first `tokens` trainable tokens of `contexts`, float32 [n, d_model]."""
        store = Store.open(str(self.folder / "store"))
        for path, site in zip(self.files(part), self.sites, strict=True):
            rows, left = [], tokens
            for context in map(int, contexts):
                rows.append(store.read_context(site, context).float()[torch.from_numpy(store.mask([context])[0])])
                left -= len(rows[-1])
                if left <= 0:
                    break
            np.save(path, torch.cat(rows)[:tokens].numpy())

    def training_tokens(self, seed: int) -> dict[str, Path]:
        """Where ``dump_training`` writes each site."""
        return {site: self.folder / f"train-{seed}-{self.options.tokens}-{site}.npy" for site in self.sites}

    def dump_training(self, seed: int) -> dict[str, Path]:
        """The tokens that a run of `seed` sees, in order, float32 [tokens, d_model], by site. It need not exist.

        Of batches of a full size from the first to the last: the short one that ends an epoch is not apart here.
        """
        paths = self.training_tokens(seed)
        config = yaml.safe_load(self.job(seed))
        stream_config = config["stream"]
        self.batch_size = stream_config["batch_size"]
        if all(path.exists() for path in paths.values()):
            return paths
        stores = pin([(str(self.folder / "store"), 1.0)], World(0, 1, 0, torch.device("cpu")))
        data = TrainingData([part.slice for part in stores])
        store = stores[0].store
        order = StreamOrder(
            batch_size=self.batch_size, seed=config["seed"], lanes=stream_config["lanes"],
            mix_contexts=stream_config["mix_contexts"], drop_last=stream_config["drop_last"],
        )  # fmt: skip
        length = stream_length(data, order, tokens=self.options.tokens)
        widths = {site: store.plan.hooks[site] for site in paths}
        aside = {site: path.with_suffix(".npy.part") for site, path in paths.items()}
        outs = {
            site: np.lib.format.open_memmap(aside[site], mode="w+", dtype=np.float32, shape=(length.tokens, width))
            for site, width in widths.items()
        }
        at = 0
        with TokenStream(data, {site: (width, store.read_dtype) for site, width in widths.items()}, order) as stream:
            for _, batch in zip(range(length.steps), stream, strict=False):
                given = batch.num_tokens
                for site, out in outs.items():
                    out[at : at + given] = batch.activations[site].float().numpy()
                at += given
        assert at == length.tokens
        for site, out in outs.items():
            out.flush()
            aside[site].rename(paths[site])
        return paths

    def peer(self, provider: str, lr: float | None, lengths: tuple[float, float], seed: int) -> dict[str, Any]:
        """Train a peer in its own process and environment."""
        width = np.load(self.files("test")[0], mmap_mode="r").shape[1]
        result = self.rows / f"{provider}-{self.kind}-{seed}-{lr}-{lengths[0]}.out"
        job = {
            "kind": self.kind, "provider": provider, "lr": lr, "seed": seed, "k": self.settings["k"],
            "threads": self.options.threads, "d_latent": round(self.settings["expansion"] * width),
            "tokens": self.options.tokens, "warmup": lengths[0], "decay": lengths[1],
            "scored": {part: self.files(part) for part in self.parts}, "out": str(result),
        }  # fmt: skip

        def train() -> dict[str, float]:
            dumped = self.dump_training(seed)
            more = {"train": [str(dumped[site]) for site in self.sites], "batch_size": self.batch_size}
            path = result.with_suffix(".job")
            path.write_text(json.dumps(job | more))
            run([self.options.peers_python, str(ROOT / "benchmarks" / "quality_peers.py"), str(path)], self.log)
            return json.loads(result.read_text())

        return self.row(Training(provider, lr, lengths, seed), job, train)

    def row(self, training: Training, job: dict[str, Any], train: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """The row of an earlier run of the same `job`, or that of a new one; kept and printed."""
        provider, seed, lengths = training.provider, training.seed, training.lengths
        path = self.rows / f"{provider}-{self.kind}-{seed}-{training.lr}-{lengths and lengths[0]}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("job") != job:
            kept = {"job": job, "result": train()}
            path.write_text(json.dumps(kept))
        row = {"model": self.name, "kind": self.kind, "provider": provider, **training.recipe, "seed": seed}
        row |= kept["result"]
        self.results.append(row)
        told = f"lr {row['lr']!s:8} warm-up {row['warmup']!s:8} seed {row['seed']}"
        scores = f"FVU {row['fvu']:.4f}  dead {row['dead']:.2%}  {row['seconds']:.0f} s"
        print(f"{row['model']:12} {row['kind']:16} {row['provider']:20} {told}  {scores}", flush=True)
        return row

    def execute(self) -> None:
        """Everything, what matters most first; the grid is searched on the first seed alone."""
        self.harvest()
        self.dump_heldout()
        for seed in self.options.seeds:
            self.ours(seed)
        if not self.options.quick:
            best = {provider: self.best(provider, self.options.seeds[0]) for provider in self.peers}
            for provider, (lr, lengths) in best.items():
                for seed in self.options.seeds[1:]:
                    self.peer(provider, lr, lengths, seed)
        for provider in self.peers:
            for seed in self.options.seeds:
                self.peer(provider, None, LENGTHS[0], seed)
        for seed in self.options.seeds:
            self.drop_batches(seed)

    def drop_batches(self, seed: int) -> None:
        """Delete what ``dump_training`` wrote."""
        for path in self.training_tokens(seed).values():
            path.unlink(missing_ok=True)

    @property
    def peers(self) -> tuple[str, ...]:
        """Trainers of this kind, of those that were asked for."""
        return tuple(
            name for name in self.options.peers if self.kind == "sae" or EARLY.get(name, name) in TRANSCODER_TRAINERS
        )

    def best(self, provider: str, seed: int) -> tuple[float, tuple[float, float]]:
        """The rate and the lengths of warm-up and decay with the least FVU on the validation tokens."""
        found: dict[tuple[float, tuple[float, float]], float] = {}
        for lengths in LENGTHS[: self.options.schedules]:
            tried: dict[float, float] = {}
            wanted = list(RATES[MIDDLE])
            while wanted:
                tried |= {lr: self.peer(provider, lr, lengths, seed)["validation_fvu"] for lr in wanted}
                around = RATES.index(min(tried, key=lambda lr: tried[lr]))
                wanted = [lr for lr in RATES[max(around - 1, 0) : around + 2] if lr not in tried]
            found |= {(lr, lengths): fvu for lr, fvu in tried.items()}
        return min(found, key=lambda settings: found[settings])


def groups(rows: list[dict[str, Any]], names: Sequence[str] = GROUP) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that differ by the seed alone, under what `names` has of them: all else that rows of a study differ by."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: mean and range of each of the ``groups``."""
    lines = [
        "| model | kind | trainer | lr | warm-up | decay | seeds | FVU mean (range) | dead mean (range) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, mine in groups(rows).items():
        cells = []
        for name, form in (("fvu", ".4f"), ("dead", ".2%")):
            values = [r[name] for r in mine]
            cells.append(f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})")
        lines.append(f"| {' | '.join(map(str, key))} | {len(mine)} | {' | '.join(cells)} |")
    return lines


def ratios(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Our FVU over the best peer's (below 1: ours is lower), both means over all seeds."""
    found: dict[str, Any] = {}
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        means: dict[tuple[Any, ...], float] = {}
        dead: dict[tuple[Any, ...], float] = {}
        for key, mine in groups([r for r in rows if (r["model"], r["kind"]) == (model, kind)]).items():
            if len(mine) == seeds:
                means[key], dead[key] = mean(r["fvu"] for r in mine), mean(r["dead"] for r in mine)
        ours = next(key for key in means if key[2] == "granary")
        name = model if kind == "sae" else f"{model} {kind}"
        found[name] = {"fvu": round(means[ours], 5)}
        if len(means) == 1:
            continue
        best = min((key for key in means if key != ours), key=lambda key: means[key])
        found[name] |= {
            "best_peer": list(best[2:]), "best_peer_fvu": round(means[best], 5),
            "fvu_over_best_peer": round(means[ours] / means[best], 4),
            "dead": round(dead[ours], 5), "best_peer_dead": round(dead[best], 5),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one seed, defaults only, 80,000 tokens")
    parser.add_argument("--model", choices=SETTINGS, nargs="+", help="default: all whose files are here")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS[:1], help="default: sae")
    parser.add_argument(
        "--peers", choices=(*CONTENDERS, *EARLY), nargs="*", default=list(CONTENDERS), help="none: ours alone"
    )
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--tokens", type=int, default=1_800_000, help="training tokens of each SAE (default 1.8 M)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the grid is searched on the first")
    parser.add_argument("--schedules", type=int, default=len(LENGTHS), help="of the grid: 1 or 2 (default)")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--work", help="folder for stores and runs; default: a temporary one")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    options = parser.parse_args()
    if options.peers and not Path(options.peers_python).exists():
        sys.exit(f"{options.peers_python} is not there: run `make setup-peers`, or name one with --peers-python")
    options.heldout = 100_000
    models = options.model or [m for m in SETTINGS if m == "bundled" or REALDATA.exists()]
    if options.quick:
        options.seeds, options.tokens, options.heldout = (0,), 80_000, 20_000
        models = models[:1]
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or temporary
        rows = []
        for model in models:
            for kind in options.kind:
                bench = Bench(model, kind, options)
                bench.execute()
                rows += bench.results
    print("\n".join(table(rows)))
    if options.csv:
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
        options.csv.write_text("\n".join(lines) + "\n")
    print_result(ratios(rows, len(options.seeds)))


if __name__ == "__main__":
    main()
