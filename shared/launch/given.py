"""Which keys the command line names, so that what was asked for can be told from a default."""

from hydra.core.hydra_config import HydraConfig


def given_keys() -> list[str]:
    """Keys and groups in the order of the command line, dotted; none where Hydra did not start this process."""
    if not HydraConfig.initialized():
        return []
    return [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
