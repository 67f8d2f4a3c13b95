"""What the benchmarks say of the machine that they ran on."""

import json
from pathlib import Path

from tests.cli import ForkServer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ASK = """
import sys; sys.path.insert(0, {folder!r})
import os; os.cpu_count = lambda: 8
from records import machine_class, print_result, read, COLUMNS
for flags in ("sse2 avx2 avx512f avx512_vnni", "avx2 avx512f avx512_bf16 amx_tile", "sse2"):
    print(machine_class(f"processor : 0\\nvendor_id\\t: GenuineIntel\\nflags\\t\\t: {{flags}}\\n\\nflags : avx512f"))
print(machine_class("Features : fp asimd\\n").partition(" ")[2])
assert all(list(row) == COLUMNS and row["class"] for row in read())
print_result({{"ratios": {{}}}})
"""


def test_a_benchmark_names_the_class_of_its_machine(stages: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(ASK.format(folder=str(BENCHMARKS)))
    done = stages.run(str(tmp_path / "ask.py"))
    assert done.code == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == [
        "Intel AVX-512 with VNNI; 8 cores",
        "Intel AVX-512 with AMX, bfloat16; 8 cores",
        "Intel no vector instructions that we know; 8 cores",
        "NEON; 8 cores",
    ]
    last = json.loads(said[-1])
    assert last["ratios"] == {}
    assert last["machine"]["class"].endswith("; 8 cores")
