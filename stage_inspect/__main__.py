"""Entry point of inspection: ``python -m stage_inspect [RUN] sae=FOLDER store.url=... run_dir=...``.

Also its tools, each a command of its own: ``python -m stage_inspect find ...``.
"""

import runpy
import sys

from shared.launch.overrides import path_overrides, run_overrides
from shared.launch.stage import run_stage
from stage_inspect.config import InspectSchema, register

TOOLS = {
    "find": "stage_inspect.find",
    "regions": "stage_inspect.regions.rank",
    "box": "stage_inspect.regions.box",
    "export": "stage_inspect.export",
    "import": "stage_inspect.explanations",
}


def main(cfg: InspectSchema) -> None:
    """Inspect as `cfg` says; the heavy imports wait until the configuration is known to be sound."""
    from shared.parallel import shutdown, telling_lost_contact
    from stage_inspect.inspect import inspect

    with telling_lost_contact():
        inspect(cfg)
    shutdown()


if sys.argv[1:2] and sys.argv[1] in TOOLS:
    module = TOOLS[sys.argv.pop(1)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:
    register()
    sys.argv[1:] = path_overrides(run_overrides(sys.argv[1:]))
    run_stage(main, "inspect")
