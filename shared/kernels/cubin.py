"""What a compiled kernel takes of a multiprocessor, read from its cubin by the tools that triton ships."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Of one multiprocessor: registers, threads, programs (CTAs), bytes of shared memory; each program costs 1 KB more.
REGISTERS, THREADS, PROGRAMS = 64 * 1024, 2048, 32
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
RESERVED = 1024


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a kernel takes."""

    warps: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of stack and local memory per thread: what did not fit in registers."""
    shared: int
    """Bytes of shared memory."""
    instructions: int
    """In the whole kernel, loops counted once."""
    barriers: int
    """Among them, waits for all warps."""

    def programs(self, architecture: int) -> int:
        """How many fit on a multiprocessor at once."""
        # Registers are given to warps in units of 256.
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            PROGRAMS,
            THREADS // (32 * self.warps),
            REGISTERS // per_warp // self.warps,
            SHARED_MEMORY[architecture] // (self.shared + RESERVED),
        )

    def occupancy(self, architecture: int) -> float:
        """Warps that fit at once, as a part of the most there can be."""
        return self.programs(architecture) * self.warps * 32 / THREADS


def resources(cubin: bytes, warps: int, shared: int) -> Resources:
    """Read a cubin. `warps` and `shared` are what the launch asks for, which it does not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    operations = [operation for operation in operations if operation != "NOP"]  # padding behind the end
    return Resources(
        warps,
        found["REG"],
        found["STACK"] + found["LOCAL"],
        shared,
        len(operations),
        sum(operation.startswith("BAR.SYNC") for operation in operations),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
