"""Names of the files that stages leave for one another and for their reader, and where each lies.

runs/demo/                  run_dir: all of one study
    store/                  stage_harvest: the activation store
    sae/                    stage_train: the folder of one training run (`sweep/` holds one for each of a sweep)
        train.yaml          the resolved configuration
        checkpoints/        training state
        discarded/          state of an earlier run, until the one that replaces it has a checkpoint
        metrics.jsonl       one JSON object per logging step
        tensorboard/
        config.json         the dictionary ...
        sae.safetensors     ... and its weights
        curves.png
    eval.json               stage_eval: all figures of one SAE (beside each SAE where there are several)
    latents.safetensors     figures of each latent
    report.html
    plots/
    latents/                stage_inspect: what each latent does (format 3)
    explorer/               pages of it for any web host
    latents.html            some of them in one file
    weights/                stage_trace: what feeds each latent of several layers and what it feeds
    comparison.json         of several SAEs
    comparison.html
"""

import os
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that stages write to; asking for a path makes nothing."""

    path: Path

    # Of a study

    @property
    def store(self) -> Path:
        """The activation store, where store.url says nothing else."""
        return self.path / "store"

    def is_own_store(self, url: str) -> bool:
        """Whether a store.url means `store`."""
        return os.path.normpath(url) == os.path.normpath(self.store)

    @property
    def sae(self) -> Path:
        """The folder of the one training run."""
        return self.path / "sae"

    @property
    def latents(self) -> Path:
        """What each latent of the dictionary does: a latents folder."""
        return self.path / "latents"

    @property
    def pages(self) -> Path:
        """The folder of pages that show what each latent does."""
        return self.path / "explorer"

    @property
    def pages_file(self) -> Path:
        """Some of these pages in one file."""
        return self.path / "latents.html"

    @property
    def global_weights(self) -> Path:
        """What feeds each latent of a set of dictionaries, and what it feeds."""
        return self.path / "weights"

    # Of a training run

    @property
    def train_config(self) -> Path:
        """The resolved configuration of the training run."""
        return self.path / "train.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of training state."""
        return self.path / "checkpoints"

    @property
    def discarded(self) -> Path:
        """Where an earlier run's state lies until the one that replaces it has a checkpoint."""
        return self.path / "discarded"

    @property
    def metrics(self) -> Path:
        """One JSON object per logging step; see `shared.basics.metrics_file`."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def config(self) -> Path:
        """The configuration of the dictionary."""
        return self.path / CONFIG_FILE

    @property
    def weights(self) -> Path:
        """The weights of the dictionary."""
        return self.path / WEIGHTS_FILE

    @property
    def curves(self) -> Path:
        """How the training run went, as a picture."""
        return self.path / "curves.png"

    @property
    def has_dictionary(self) -> bool:
        """Whether both files of a dictionary in this project's format are there."""
        return self.config.is_file() and self.weights.is_file()

    # Of a sweep

    @property
    def packed_list(self) -> Path:
        """The configurations of a sweep's runs that are trained from one pass."""
        return self.path / "packed.yaml"

    # Of an evaluation

    @property
    def evaluation(self) -> Path:
        """All figures of one SAE."""
        return self.path / "eval.json"

    @property
    def latent_figures(self) -> Path:
        """Figures of each latent, as tensors."""
        return self.path / "latents.safetensors"

    @property
    def report(self) -> Path:
        """The report of one SAE, a page that opens offline."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.path / "plots"

    @property
    def comparison(self) -> Path:
        """Figures of several SAEs side by side."""
        return self.path / "comparison.json"

    @property
    def comparison_page(self) -> Path:
        """The same as a page that opens offline."""
        return self.path / "comparison.html"
