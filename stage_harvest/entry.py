"""Which harvest it is: of a decoder, of a model of texts, sounds or images, or of what a user's function makes."""

from shared.basics.errors import GranaryError
from shared.lm.encoders import is_encoder
from shared.lm.identity import read_config
from stage_harvest import harvest as of_decoder
from stage_harvest.config import AudioCorpus, BatchesCorpus, HarvestSchema, ImagesCorpus
from stage_harvest.factory import run as of_any
from stage_harvest.factory.encoder import encoder_of_text
from stage_harvest.factory.media import media_model


def harvest(cfg: HarvestSchema) -> None:
    """Run the stage; raises GranaryError for every wrong input before anything is written."""
    if cfg.model.factory is not None:
        of_any.harvest(cfg, of_any.of_function)
    elif isinstance(cfg.corpus, AudioCorpus | ImagesCorpus):
        of_any.harvest(cfg, media_model)
    elif not isinstance(cfg.corpus, BatchesCorpus) and names_encoder(cfg):
        of_any.harvest(cfg, encoder_of_text)
    else:
        of_decoder.harvest(cfg)


def names_encoder(cfg: HarvestSchema) -> bool:
    """Whether the model is an encoder; one that can't be had is left to those who say so."""
    try:
        return is_encoder(read_config(cfg.model.path, cfg.model.revision))
    except GranaryError:
        return False
