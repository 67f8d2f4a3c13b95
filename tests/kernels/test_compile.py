"""Every kernel compiles for the GPUs it is meant for, without one."""

import importlib.util
import os
import subprocess
import sys

import pytest


def compile_check(*arguments, **environment):
    """Run the check in a process of its own: the interpreter, which the other tests use, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "error", "-m", "shared.kernels.compile_check", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow  # `.ci/run` compiles all of them by `make compile-kernels`
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_shipped_kernel_compiles_for_sm_80_and_sm_90_without_spilling():
    result = compile_check("--d-model", "4096", "--k", "64", "--types", "bf16", "--table")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:]]
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = ("select", "unpack", "count", "emit", "decode", "residual", "residual_grad", "dot_picks", "row_grad")
    kernels += ("transform_project", "transform_expand", "transform_outer")
    for kernel in (*kernels, "chunk_sums", "latent_sum", "row_update", "pair_norm", "pair_update"):
        for architecture in ("sm_80", "sm_90"):
            assert any(
                row[0].startswith(f"{architecture} {kernel} ") or row[0] == f"{architecture} {kernel}" for row in rows
            )
    for name, *numbers in rows:
        registers, _, programs = map(int, numbers[1:4])
        assert 16 <= registers <= 255, name
        assert programs >= 1, name
        if name.startswith("sm_90 pair_norm"):
            assert programs >= 16, "a walk over pairs hides its latency by the number of programs"
        if name.startswith("sm_90 pair_update") and "unit_rows=True" in name:
            assert programs == 2, "one program loads while the other computes"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel_that_spills_is_refused():
    tight = (
        "from shared.kernels import compile_check, tuning\n"
        "with tuning.trial({'pair_norm d=768': {'BLOCK_D': 1024, 'num_warps': 1, 'maxnreg': 32}}):\n"
        "    raise SystemExit(compile_check.main('--d-model 768 --k 64 --types bf16 --only pair_norm'.split()))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", tight], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "sm_90 pair_norm d=768 bf16 N=8192: FAILED: spills" in result.stdout


def test_the_interpreter_is_refused():
    result = compile_check(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unset TRITON_INTERPRET")
