"""Whether the present checkout computes what another commit computes, bit for bit.

    make bit-identical BASE=193b563
    make bit-identical BASE=193b563 ARGS="--only '*topk*' --cache ~/.cache/granary-bits"
    python -m tests.bit_identical 193b563 --keep /tmp/both --record digests.json

A git worktree of BASE in a temporary folder and the present checkout, uncommitted changes included, each run the matrix
of ``tests.bits.matrix`` through the stages' command lines with this environment's Python. Every object of the stores,
every tensor of the SAEs, the metrics and the evaluations are compared; what may differ is listed in
``tests.bits.compare``. One line per case. The exit status is 1 when anything differs or fails, 2 for a wrong command.
"""

import argparse
import hashlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from shared.kernels.linear import FAST_BFLOAT16
from tests.bits.compare import compare_files
from tests.bits.matrix import CASES, Case, chosen
from tests.bits.runner import ENVIRONMENT, Side

REPOSITORY = Path(__file__).resolve().parent.parent
# Written anew by every version of the format: a difference is told and no more. The weights beside it are compared.
TOLD_ALONE = "config.json"
# Changed on purpose where the processor has no bfloat16 instruction.
ROUNDED = "bfloat16-products"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = parse(arguments)
    cases = chosen(options.only)
    if not cases:
        return refuse(f"no case matches {options.only!r}: choose from {', '.join(case.name for case in CASES)}")
    commit = git("rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}")
    if not commit:
        return refuse(f"{options.base!r} is no commit of this repository")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        return refuse(f"{options.keep} is not empty: give a folder that is empty or not there")
    if options.jobs < 1 or (options.record is not None and not options.record.resolve().parent.is_dir()):
        return refuse("--jobs must be at least 1, and the folder of --record must be there")
    if not FAST_BFLOAT16 and any(case.name == ROUNDED for case in cases):
        cases = [case for case in cases if case.name != ROUNDED]
        say(f"{ROUNDED} left out: this processor has no instruction for bfloat16, so that it is float32 now")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no process and no worktree behind, as Ctrl-C
    begun = time.monotonic()
    with temporary_folder() as scratch:
        results = (options.keep or scratch).resolve()
        base_results = results / "base"
        if options.cache is not None:
            base_results = options.cache.resolve() / f"{commit[:12]}-{matrix_hash()}"
        with worktree(commit, scratch / "tree") as tree:
            base, head = Side("base", tree, base_results), Side("head", REPOSITORY, results / "head")
            failures = {side.label: side.run(cases, options.jobs, say_aside) for side in (base, head)}
        status = report(cases, base, head, failures)
        if options.record is not None:
            record = {side.label: digests(cases, side.folder) for side in (base, head)}
            options.record.write_text(json.dumps({"base_commit": commit, **record}, indent=1) + "\n")
    say(f"{len(cases)} cases in {time.monotonic() - begun:.0f} s against {commit[:12]}")
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bit_identical", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases by shell pattern, and what they need")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave both sides' results there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep BASE's results there, and use what is there")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the SHA-256 of every file compared")
    parser.add_argument("--jobs", type=int, default=2, help="cases that run side by side (2)")
    return parser.parse_args(arguments)


def report(cases: Sequence[Case], base: Side, head: Side, failures: dict[str, dict[str, str]]) -> int:
    """One line per case; 1 when any is not identical."""
    status = 0
    for case in cases:
        failed = [f"{label} failed: {errors[case.name]}" for label, errors in failures.items() if case.name in errors]
        if failed:
            differences, told = failed, []
        else:
            found = compare_case(case, base.folder, head.folder)
            told = [line for line in found if is_told_alone(line)]
            differences = [line for line in found if not is_told_alone(line)]
        status = status or int(bool(differences))
        say(f"{case.name:24} {verdict(differences, told)}")
    return status


def compare_case(case: Case, base: Path, head: Path) -> list[str]:
    """Every difference between the files of a case in two folders."""
    names = sorted(files(case, base) | files(case, head))
    if not names:
        return [f"no file matches {', '.join(case.files)}"]
    return [difference for name in names for difference in compare_files(name, base / name, head / name)]


def is_told_alone(difference: str) -> bool:
    """Whether it is of a config.json; a store has none."""
    return difference.partition(":")[0].endswith(f"/{TOLD_ALONE}")


def verdict(differences: Sequence[str], told: Sequence[str]) -> str:
    """``identical``, or the first difference and how many more."""
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    text = f"DIFFERS    {differences[0]}{more}" if differences else "identical"
    return text if not told else f"{text}; told alone: {told[0]}" + (f" (and {len(told) - 1} more)" if told[1:] else "")


def files(case: Case, folder: Path) -> set[str]:
    """Names of what a case has left, relative to `folder`."""
    found = (path for pattern in case.files for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix() for path in found if path.is_file()}


def digests(cases: Sequence[Case], folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file, by case and name."""
    return {
        case.name: {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(files(case, folder))
        }
        for case in cases
    }


def matrix_hash() -> str:
    """Of all that fixes the results of a commit: the commands, their environment, the libraries, the processor."""
    processor = Path("/proc/cpuinfo")
    model = [line for line in processor.read_text().splitlines() if line.startswith("model name")][:1]
    libraries = {name: version(name) for name in ("torch", "numpy", "transformers", "tokenizers", "zarr")}
    facts = [[case.command() for case in CASES], ENVIRONMENT, libraries, platform.python_version(), model]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Outside both trees, so that neither is the current folder of a command."""
    with tempfile.TemporaryDirectory(prefix="granary-bits-") as folder:
        yield Path(folder).resolve()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, with a record of the distribution as it was called then: the venv holds today's."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit, check=True)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    record = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str, check: bool = False) -> str:
    """What git prints; nothing where it fails, unless `check`."""
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=check, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def say(text: str) -> None:
    """A result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_aside(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def refuse(message: str) -> int:
    """One line, and the status of a wrong command."""
    say_aside(f"error: {message}")
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
