"""Entry point of attribution graphs: ``python -m stage_trace RUN... text="..."``."""

import sys

from shared.launch.stage import run_stage
from stage_trace.config import TraceSchema, expand_arguments, register


def main(cfg: TraceSchema) -> None:
    """Make the graph that `cfg` describes; the heavy imports wait until the configuration is known to be sound."""
    from stage_trace.job import trace_text

    trace_text(cfg)


register()
sys.argv[1:] = expand_arguments(sys.argv[1:])
run_stage(main, "trace")
