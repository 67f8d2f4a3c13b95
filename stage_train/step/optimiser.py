"""From the config group ``optim`` to the options of an optimiser."""

from dataclasses import fields
from enum import Enum

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.optim import OPTIMISERS, OptimiserConfig
from stage_train.config import OptimSchema
from stage_train.step.schedule import bias_factor

COMMON = {field.name for field in fields(OptimiserConfig)}
# Keys that are for some kinds alone, and null for the others.
SPECIAL = sorted({field.name for kind in OPTIMISERS.values() for field in fields(kind.config_type)} - COMMON)


def optimiser_config(cfg: OptimSchema, sae: DictionaryConfig, lr: float) -> OptimiserConfig:
    """Options of the optimiser that `cfg` asks for; `lr` is what its rate stands for.

    Raises GranaryError for a value that it does not take, or lacks.
    """
    kind = cfg.kind.value
    config_type = OPTIMISERS[kind].config_type
    taken = {field.name for field in fields(config_type)}
    given = {name: value for name in SPECIAL if (value := getattr(cfg, name)) is not None}
    for need, names in (("needs a value for", taken & set(SPECIAL) - given.keys()), ("has no", given.keys() - taken)):
        for name in sorted(names):
            raise GranaryError(f"optim.kind={kind} {need} optim.{name}: begin from optim={kind}")
    return config_type(
        lr=lr,
        clip_norm=cfg.clip_norm,
        decoder_factor=cfg.decoder_factor,
        bias_factor=bias_factor(cfg.bias_factor, sae),
        **{name: value.value if isinstance(value, Enum) else value for name, value in given.items()},
    )
