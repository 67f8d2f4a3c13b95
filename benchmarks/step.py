"""Seconds and memory of one SAE training step on a CPU, ours beside the encoder's matrix product and the peers.

    python benchmarks/step.py --shape a
    python benchmarks/step.py --shape a --variants
    python benchmarks/step.py --quick

Ours have memory as our stages ask for it (``shared.launch.allocator``); the others are as their users start them, or
have it too with ``--same-memory``.

``--variants`` times transcoder, crosscoder, CLT, MoLT and Lorsa in place of the peers, each beside what it is held
against.

Every contender runs in its own process on the same data and is stepped in turn, so that a slow minute of the machine
falls on all of them; medians are over rounds. Peers live in an environment of their own, made with
``make setup-peers``; those that are not installed are left out. Appends to benchmarks/results.csv with --record; the
last line printed is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, Record, append, print_result, processor
from step_providers import PACKAGES, PEERS, SHAPES, Shape
from step_variants import RATIOS, VARIANT_PROVIDERS

from shared.launch.allocator import as_environment

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"


class Contender:
    """A worker process and the times of its steps."""

    def __init__(self, name: str, python: str, shape: Shape, threads: int) -> None:
        numbers = [shape.d_model, shape.d_latent, shape.k, shape.batch, threads]
        command = [python, str(HERE / "step_worker.py"), name, *map(str, numbers)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        if name.startswith("granary"):
            environment |= as_environment()
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.seconds: list[float] = []
        self.peak: dict[str, Any] = {}

    def ask(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            assert self.process.stderr is not None
            raise SystemExit(f"{self.name} failed:\n{self.process.stderr.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> None:
        self.peak = self.ask("peak")
        self.process.communicate()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def race(names: list[str], shape: Shape, rounds: int, threads: int, peers_python: str) -> list[Contender]:
    """Step all contenders in turn; the first step of each is not counted."""
    contenders = [Contender(n, peers_python if n in PEERS else sys.executable, shape, threads) for n in names]
    for contender in contenders:
        contender.ask("step")
    for _ in range(rounds):
        for contender in contenders:
            contender.seconds.append(contender.ask("step")["seconds"])
    for contender in contenders:
        contender.finish()
    return contenders


def peer_versions(python: str) -> dict[str, str]:
    """Installed peers of an environment, by provider name."""
    script = (
        "import importlib.metadata as m, json\n"
        f"found = {{}}\nfor name, package in {PACKAGES!r}.items():\n"
        "    try: found[name] = m.version(package)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", script], capture_output=True, check=True).stdout)
    return found


def record(contenders: list[Contender], shape: Shape, threads: int, versions: dict[str, str]) -> None:
    """Append a row per contender."""
    records = []
    for contender in contenders:
        dtype = "bfloat16" if "bfloat16" in contender.name else "float32"
        peak_mb = contender.peak["peak_mb"]
        records.append(Record("step", contender.name, str(shape), dtype, contender.seconds, peak_mb))
    append(records, processor(), threads, versions)


def variant_ratios(by_name: dict[str, Contender]) -> dict[str, float]:
    """Seconds of each kind of dictionary over those of what it is held against, the fastest of that; printed too."""
    found = {}
    for name, others, wanted in RATIOS:
        there = [by_name[other] for other in others if other in by_name]
        if name not in by_name or not there:
            continue
        best = min(there, key=lambda one: one.median)
        found[f"{name}/{best.name}"] = round(by_name[name].median / best.median, 3)
        peaks = f"peak {by_name[name].peak['peak_mb']:.0f} over {best.peak['peak_mb']:.0f} MB"
        print(f"  {name} / {best.name}: {found[f'{name}/{best.name}']:.2f} ({wanted}), {peaks}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", default=PEERS_PYTHON, help="of the environment with the peers")
    parser.add_argument("--only", nargs="*", help="these providers alone")
    parser.add_argument("--same-memory", action="store_true", help="for all, not for ours alone")
    parser.add_argument("--variants", action="store_true", help="the other kinds of dictionaries, not the peers")
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds, within a minute")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    if options.same_memory:
        os.environ.update(as_environment())  # which every contender inherits
    shape = SHAPES[("quick-variants" if options.variants else "quick") if options.quick else options.shape]
    rounds = min(options.rounds, 3 if options.variants else 5) if options.quick else options.rounds

    peers_python = options.peers_python if Path(options.peers_python).exists() else sys.executable
    versions = peer_versions(peers_python)
    of_saes = ["gemm", "gemm-onednn", "granary", "granary-bfloat16", "dense", *versions]
    of_variants = ["granary", *VARIANT_PROVIDERS]
    names = options.only or (of_variants if options.variants else of_saes)
    contenders = race(names, shape, rounds, options.threads, peers_python)
    by_name = {contender.name: contender for contender in contenders}
    print(f"{shape}, {options.threads} threads, {processor()}, torch {torch.__version__}; median of {rounds} steps")
    for contender in contenders:
        relative = f"{contender.median / by_name['granary'].median:6.2f} x ours" if "granary" in by_name else ""
        print(f"  {contender.name:20s} {contender.median:8.4f} s  {relative}  peak {contender.peak['peak_mb']:6.0f} MB")
    if options.record:
        record(contenders, shape, options.threads, versions)
    ratios = {}
    if "granary" in by_name:
        ours = by_name["granary"].median
        ratios = {f"{name}/granary": round(c.median / ours, 3) for name, c in by_name.items() if name != "granary"}
        products = [by_name[name].median for name in ("gemm", "gemm-onednn") if name in by_name]
        if products:
            ratios["granary/faster gemm"] = round(ours / min(products), 3)
    ratios |= variant_ratios(by_name)
    print_result({
        "shape": str(shape),
        "seconds": {name: round(contender.median, 4) for name, contender in by_name.items()},
        "peak_mb": {name: round(contender.peak["peak_mb"]) for name, contender in by_name.items()},
        "ratios": ratios,
        "memory_as_stages": "all" if options.same_memory else "ours",
        "versions": {"torch": torch.__version__, **versions},
    })  # fmt: skip


if __name__ == "__main__":
    main()
