"""Entry point of evaluation: ``python -m stage_eval sae=FOLDER|GLOB|LIST store.url=... run_dir=...``."""

import sys

from shared.launch.overrides import path_overrides
from shared.launch.stage import run_stage
from stage_eval.config import EvalSchema, register


def main(cfg: EvalSchema) -> None:
    """Evaluate as `cfg` says; the heavy imports wait until the configuration is known to be sound."""
    from stage_eval.evaluate import evaluate

    evaluate(cfg)


register()
sys.argv[1:] = path_overrides(sys.argv[1:])
run_stage(main, "eval")
