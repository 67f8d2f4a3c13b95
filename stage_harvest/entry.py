"""The harvest of a model in Hugging Face form, or of what a function of the user's makes."""

from stage_harvest import harvest as of_model
from stage_harvest.config import HarvestSchema
from stage_harvest.factory import run as of_factory


def harvest(cfg: HarvestSchema) -> None:
    """Run the stage; raises GranaryError for every wrong input before anything is written."""
    if cfg.model.factory is None:
        of_model.harvest(cfg)
    else:
        of_factory.harvest(cfg)
