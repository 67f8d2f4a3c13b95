"""Entry point of the harvest: ``python -m stage_harvest model=... corpus=... run_dir=...``."""

from shared.launch.stage import run_stage
from stage_harvest.config import HarvestSchema, register


def main(cfg: HarvestSchema) -> None:
    """Harvest as `cfg` says; the heavy imports wait until the configuration is known to be sound."""
    from shared.parallel import shutdown, telling_lost_contact
    from stage_harvest.entry import harvest

    with telling_lost_contact():
        harvest(cfg)
    shutdown()


register()
run_stage(main, "harvest")
