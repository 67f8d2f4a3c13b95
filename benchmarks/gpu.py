"""The first minutes on a GPU: does every kernel compute what it should, and how near the floor is the step?

    python3 benchmarks/gpu.py --out DIR            # at most 8 minutes; needs torch, triton and pytest, nothing else
    python3 benchmarks/gpu.py --out DIR --only "step a" probes
    python3 benchmarks/gpu.py --out DIR --rehearse # every line at tiny sizes in triton's interpreter, on a CPU

Stages go from cheap to dear. Each runs in a process of its own with a time limit, so that a crash, a hang or an illegal
access ends one stage alone; every result is a line of DIR/results.jsonl, on disk before the next is begun, and
DIR/table.md is written anew after each stage. A stage that fails is run once more with CUDA_LAUNCH_BLOCKING=1, which
names the kernel; a step that fails is then measured in its plain form.

The floor is the encoder's product, 2 N F d over the bfloat16 rate measured in stage ``machine``.
"""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_stages.table import table

HERE = Path(__file__).resolve().parent
BUDGET = 480
"""Seconds for all stages."""


@dataclass(frozen=True)
class Stage:
    """A function of a module of ``gpu_stages``, with the seconds it may take."""

    name: str
    module: str
    seconds: int
    argument: str | None = None
    compiled: bool = False
    """It compiles kernels itself: a rehearsal must not interpret them there."""


STAGES = [
    Stage("machine", "machine", 45),
    Stage("compile", "compiling", 60, compiled=True),
    Stage("checks even", "checks", 75, "even"),
    Stage("checks ragged", "checks", 75, "ragged"),
    Stage("train", "training", 75),
    Stage("step a", "steps", 60, "a"),
    Stage("step b", "steps", 90, "b"),
    Stage("step cached", "steps", 40, "cached"),
    Stage("auxk", "auxk", 60),
    Stage("load", "load", 60),
    Stage("staging", "staging", 60),
    Stage("probes", "probes", 60),
    Stage("tests", "kernel_tests", 100),
    Stage("checks large", "checks", 90, "large"),
    Stage("store", "store", 200),
]


def run_stage(stage: Stage, options: argparse.Namespace) -> None:
    """In the child: this process runs nothing else."""
    faulthandler.dump_traceback_later(max(5, stage.seconds - 5), exit=False)
    sys.path.insert(0, str(HERE.parent))
    from gpu_stages.context import Context

    context = Context(stage.name, options.out, options.rehearse, options.fallback)
    module = importlib.import_module(f"gpu_stages.{stage.module}")
    module.run(*(context, stage.argument) if stage.argument else (context,))


def start_stage(stage: Stage, options: argparse.Namespace, seconds: float, attempt: str) -> bool:
    """In the parent, which never touches the GPU: a child for the stage; whether it ended well."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--stage", stage.name]
    command += ["--rehearse"] * options.rehearse + ["--fallback"] * (attempt == "fallback")
    environment = dict(os.environ, PYTHONUNBUFFERED="1", TORCH_SHOW_CPP_STACKTRACES="1")
    environment |= {"TRITON_CACHE_DIR": str(options.out / "cache")}
    environment |= {"CUDA_LAUNCH_BLOCKING": "1"} if attempt == "blocking" else {}
    environment |= {"TRITON_INTERPRET": "1"} if options.rehearse and not stage.compiled else {}
    if stage.compiled:
        environment.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    log = options.out / f"{stage.name.replace(' ', '-')}-{attempt}.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with whatever it started
            child.wait()
            status = "timeout"  # type: ignore[assignment]
    end = log.read_text(errors="replace").strip().splitlines()[-1:] if status else []
    write_line(
        options.out, stage=stage.name, name="stage", attempt=attempt, ok=status == 0, status=status,
        seconds=round(time.monotonic() - begin, 1), end=" ".join(end)[:300],
    )  # fmt: skip
    return status == 0


def write_line(out: Path, **line: Any) -> None:
    """As ``gpu_stages.context`` does; the parent imports nothing that needs torch."""
    print(json.dumps(line), flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(out: Path) -> list[dict[str, Any]]:
    """All results so far; a line that a killed process left half written is left out."""
    lines = []
    for text in (out / "results.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def main() -> int:
    """Exit status 0 if every stage ended well and every check passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "runs" / "gpu", help="folder for results.jsonl, table.md, logs"
    )
    parser.add_argument("--only", nargs="*", choices=[stage.name for stage in STAGES], help="these stages")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, without a GPU")
    parser.add_argument("--quick", action="store_true", help="as --rehearse, for make bench")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--fallback", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rehearse |= options.quick
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(next(stage for stage in STAGES if stage.name == options.stage), options)
        return 0
    (options.out / "results.jsonl").touch()
    deadline = time.monotonic() + options.budget
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        attempts = ["first", "blocking"] + ["fallback"] * (stage.module == "steps")
        for attempt in attempts:
            left = deadline - time.monotonic()
            if left < 10:
                line = {"stage": stage.name, "name": "stage", "attempt": attempt, "ok": False, "status": "no time left"}
                write_line(options.out, **line, seconds=0, end="")
                break
            if start_stage(stage, options, left if options.rehearse else min(stage.seconds, left), attempt):
                break
        (options.out / "table.md").write_text(table(read_lines(options.out)))
    lines = read_lines(options.out)
    print(table(lines))
    last = {line["stage"]: line["ok"] for line in lines if line["name"] == "stage"}
    return 0 if all(last.values()) and all(line.get("ok", True) for line in lines if line["name"] != "stage") else 1


if __name__ == "__main__":
    sys.exit(main())
