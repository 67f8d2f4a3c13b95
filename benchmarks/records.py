"""``benchmarks/results.csv``: append-only records of what was measured, where and with what."""

import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
COLUMNS = ["date", "commit", "machine", "threads", "versions", "op", "provider", "shape", "dtype",
           "p20_s", "p50_s", "p80_s", "peak_mb", "class"]  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
# By the flag of /proc/cpuinfo: what decides a matrix product's speed, the best first, and what may come beside it.
INSTRUCTIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
EXTENSIONS = {"amx_tile": "AMX", "avx512_bf16": "bfloat16", "avx512_vnni": "VNNI"}


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
    """CPU name as the kernel gives it."""
    return _cpuinfo().get("model name") or platform.processor()


def machine_class(cpuinfo: str | None = None) -> str:
    """What two machines must share for their figures to compare: ``AMD AVX-512 with bfloat16, VNNI; 2 cores``.

    `cpuinfo` is the text of /proc/cpuinfo; that of this machine where it is not given.
    """
    found = _cpuinfo(cpuinfo)
    flags = (found.get("flags") or found.get("Features", "")).split()
    vendor = VENDORS.get(found.get("vendor_id", ""), platform.machine())
    best = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "no vector instructions that we know")
    beside = ", ".join(name for flag, name in EXTENSIONS.items() if flag in flags)
    return f"{vendor} {best}{f' with {beside}' if beside else ''}; {os.cpu_count()} cores"


def print_result(found: Mapping[str, Any]) -> None:
    """A benchmark's last line: one JSON object, with the machine that it is of."""
    print(json.dumps({**found, "machine": {"class": machine_class(), "processor": processor()}}))


def _cpuinfo(text: str | None = None) -> dict[str, str]:
    """The first processor's fields."""
    try:
        first = (CPUINFO.read_text() if text is None else text).split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


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
                             record.dtype, *times, peak, machine_class()])  # fmt: skip


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """All records, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
