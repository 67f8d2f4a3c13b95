"""Every kernel compiles for the GPUs it is meant for, without one."""

import importlib.util
import os
import subprocess
import sys

import pytest


def compile_check(*arguments, **environment):
    """Run the check in a process of its own: the interpreter, which the other tests use, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "shared.kernels.compile_check", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow  # `.ci/run` compiles all of them by `make compile-kernels`
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_sm_80_and_sm_90():
    result = compile_check("--d-model", "768", "--k", "64", "--types", "bf16")
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = ("select", "unpack", "count", "emit", "decode", "dot_picks", "row_grad", "latent_sum", "row_update")
    for kernel in (*kernels, "pair_norm", "pair_update"):
        for architecture in ("sm_80", "sm_90"):
            assert any(line.startswith(f"{architecture} {kernel}") and "cubin" in line for line in lines), kernel


def test_the_interpreter_is_refused():
    result = compile_check(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unset TRITON_INTERPRET")
