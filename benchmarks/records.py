"""``benchmarks/results.csv``: append-only records of what was measured, where and with what."""

import csv
import datetime
import platform
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
COLUMNS = ["date", "commit", "machine", "threads", "versions", "op", "provider", "shape", "dtype",
           "p20_s", "p50_s", "p80_s", "peak_mb"]  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Times of one operation of one provider; `seconds` holds one entry per repetition."""

    op: str
    provider: str
    shape: str
    dtype: str
    seconds: list[float]
    peak_mb: float | None


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def processor() -> str:
    """CPU name and number of cores as the kernel gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return name


def append(records: list[Record], machine: str, threads: int, versions: dict[str, str], path: Path = RESULTS) -> None:
    """Add one line per record; `versions` maps a provider to its software's version."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for record in records:
            software = f"torch {torch.__version__}"
            if record.provider in versions:
                software += f"; {record.provider} {versions[record.provider]}"
            times = [f"{seconds:.5f}" for seconds in quantiles(record.seconds)]
            peak = "" if record.peak_mb is None else round(record.peak_mb)
            writer.writerow([date, commit, machine, threads, software, record.op, record.provider, record.shape,
                             record.dtype, *times, peak])  # fmt: skip


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """All records, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
