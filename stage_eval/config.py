"""Schema of evaluation: what ``conf/eval.yaml`` may hold. Types and meanings here, values in ``conf/``.

Imports nothing heavy, so that a wrong key is reported at once.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import shared.basics.config
from shared.basics.config import DeviceSchema, EvaluatedModel, Split, StoreInput, TokenKind, key


@dataclass(kw_only=True)
class SAEInput:
    """Which SAEs to evaluate."""

    path: Any = MISSING
    """A folder with an SAE, a folder of such folders, a glob, a hub id, or a list of these."""
    last_grid: bool = MISSING
    """Of the folder of a sweep, only the runs of the last sweep in it; it keeps those of earlier ones too."""
    per_pass: int = MISSING
    """SAEs held in memory at a time; those of one hook share the reads and the unspliced passes."""


@dataclass(kw_only=True)
class EvalSchema:
    """``conf/eval.yaml``."""

    name: str = MISSING
    """Name of the run; its folder is ``run_dir``."""
    run_dir: str = MISSING
    """Folder of the run that the other keys' defaults lie in."""
    out_dir: str | None = MISSING
    """Where the results of one SAE, or the comparison of several, go. null: into ``run_dir``; but those of one that is
    not the run's own, ``<run_dir>/sae``, go beside it."""
    seed: int = MISSING
    """Which decoder directions are sampled for their nearest neighbours; with ``supervised=true`` also the halves of
    the documents, the drawn tokens, the random latents and the resamples."""
    nproc: int = MISSING
    """Processes on this machine; the same as starting the stage with torchrun."""
    sae: SAEInput = field(default_factory=SAEInput)
    store: StoreInput = field(default_factory=StoreInput)
    model: EvaluatedModel = field(default_factory=EvaluatedModel)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    hook: str | None = MISSING
    """Which of the store's hooks; null takes the one that each SAE was trained on."""
    split: Split = MISSING
    kinds: list[TokenKind] | None = MISSING
    """Of a store with images: score tokens of these kinds alone, text, image, assistant (docs/vision.md); null: all
    trainable ones."""
    contexts: int | None = key(count=True)
    """Evaluate this many contexts, evenly spaced over the split; null takes all."""
    batch_contexts: int | None = MISSING
    """Contexts per forward; null: as many as make 4,096 tokens."""
    downstream: bool = MISSING
    """Run the language model too; false scores the reconstruction alone and needs no model."""
    splice_bos: bool = MISSING
    """Replace the activation of BOS as well. SAEs are not trained on BOS, so it is left alone by default."""
    supervised: bool = MISSING
    """Score the latents against labels of Python's own tokenizer too, where the store's text is Python: sparse probing,
    splitting, absorption, targeted perturbation, removal of spurious correlations."""
    supervised_examples: int = key(count=True)
    """Tokens that are drawn for them of each label and half of the documents at most."""
    joint: bool = MISSING
    """With SAEs of several hooks, one per hook: also splice all of them at once."""
    report: bool = MISSING
    """Draw report.html and plots, which takes seconds per SAE; false leaves the figures alone, eval.json and
    latents.safetensors, and removes the report of an earlier evaluation in that place."""


def register() -> None:
    """Put the schemas into Hydra's ConfigStore."""
    shared.basics.config.register()
    ConfigStore.instance().store(name="eval_schema", node=EvalSchema)
