"""Schema of inspection: what ``conf/inspect.yaml`` may hold. Types and meanings here, values in ``conf/``.

Imports nothing heavy, so that a wrong key is reported at once.
"""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import shared.basics.config
from shared.basics.config import DeviceSchema, EvaluatedModel, Split, StoreInput, key


@dataclass(kw_only=True)
class DictionaryInput:
    """Which dictionary to look into."""

    path: str = MISSING
    """A folder with a trained dictionary, or a hub id."""


@dataclass(kw_only=True)
class LatentsOutput:
    """Where what is found goes, and how much of it is kept."""

    url: str = MISSING
    """Folder or fsspec URL of the latents folder."""
    overwrite: bool = MISSING
    """Replace a folder of another dictionary, store or settings; its notes are kept beside the new ones."""
    window: int = MISSING
    """Tokens of a window, within a document: what counts as one example."""
    top: int = MISSING
    """Strongest examples kept of each latent."""
    sample: int = MISSING
    """Examples of each latent's uniform sample, from which its tenths by value are taken."""
    token_sample: int = MISSING
    """Firing tokens of each latent's uniform sample, from which its frequent tokens are counted."""
    together_tokens: int = key(count=True)
    """Tokens of the sample in which all latents are compared: which fire together."""
    pool: int = MISSING
    """Random windows, shared by all latents, of which those where a latent is silent are shown."""


@dataclass(kw_only=True)
class InspectSchema:
    """``conf/inspect.yaml``."""

    name: str = MISSING
    """Name of the run; its folder is ``run_dir``."""
    run_dir: str = MISSING
    """Folder of the run that the other keys' defaults lie in."""
    seed: int = MISSING
    """Which windows and tokens the samples hold."""
    nproc: int = MISSING
    """Processes on this machine; the same as starting the stage with torchrun."""
    sae: DictionaryInput = field(default_factory=DictionaryInput)
    store: StoreInput = field(default_factory=StoreInput)
    latents: LatentsOutput = field(default_factory=LatentsOutput)
    model: EvaluatedModel = field(default_factory=EvaluatedModel)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    hook: str | None = MISSING
    """Which of the store's hooks, for a dictionary of one site; null takes the one that it was trained on."""
    split: Split = MISSING
    contexts: int | None = key(count=True)
    """Look at this many contexts, evenly spaced over the split; null takes all."""
    logits: bool = MISSING
    """Also what each latent does to the logits, which needs the language model's head; false needs no model."""
    dry_run: bool = MISSING
    """Say what would be done and the memory it takes, and do nothing."""


def register() -> None:
    """Put the schemas into Hydra's ConfigStore."""
    shared.basics.config.register()
    ConfigStore.instance().store(name="inspect_schema", node=InspectSchema)
