"""Entry point of training: ``python -m stage_train store.url=... sae.k=... out_dir=...``."""

import sys

from shared.launch.stage import run_stage
from stage_train import many
from stage_train.config import TrainSchema, register
from stage_train.online import driver


def main(cfg: TrainSchema) -> None:
    """Train as `cfg` says; the heavy imports wait until the configuration is known to be sound."""
    if cfg.packed:
        many.gather(cfg)
        return
    from stage_train.job import train

    train([cfg])


if driver.is_wanted(sys.argv[1:]):
    driver.main()
else:
    register()
    run_stage(main, "train", afterwards=many.train_gathered)
