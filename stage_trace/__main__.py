"""Entry point of attribution graphs: ``python -m stage_trace RUN... text="..."``.

Also of global weights, a command of their own: ``python -m stage_trace weights RUN... --store URL``.
"""

import runpy
import sys

from shared.launch.stage import run_stage
from stage_trace.config import TraceSchema, expand_arguments, register


def main(cfg: TraceSchema) -> None:
    """Make the graph that `cfg` describes; the heavy imports wait until the configuration is known to be sound."""
    from stage_trace.job import trace_text

    trace_text(cfg)


if sys.argv[1:2] == ["weights"]:
    del sys.argv[1]
    runpy.run_module("stage_trace.weights", run_name="__main__", alter_sys=True)
else:
    register()
    sys.argv[1:] = expand_arguments(sys.argv[1:])
    run_stage(main, "trace")
