"""Stage ``tests``: the kernels' own tests, compiled instead of interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_stages.context import Context

ROOT = Path(__file__).resolve().parent.parent.parent


def run(context: Context) -> None:
    """All of them, to the end, whatever fails; this machine's torch may warn where the pinned one does not."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "--confcutdir=tests/kernels"]
    command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--junitxml={context.out / 'tests.xml'}"]
    command += ["-k", "unknown_switch" if context.rehearse else "triton"]
    if not context.rehearse:
        command += ["-p", "xdist", "-n", "8"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other packages' are no part of it
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (context.out / "tests.log").write_text(outcome.stdout + outcome.stderr)
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", outcome.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome.stdout, re.MULTILINE)
    context.say("kernel tests", ok=outcome.returncode == 0, **counts, which=failed[:20])
