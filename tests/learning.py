"""An SAE and how it is learnt in one object, for tests that look at losses and gradients."""

from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shared.sae.config import SAEConfig
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.variants import SAE


def split_fields(given: dict[str, Any]) -> tuple[SAEConfig, LearningConfig]:
    """Fields of both configs, told apart by their names; an unknown one is a TypeError."""
    learning = {field.name for field in fields(LearningConfig)}
    own = {name: value for name, value in given.items() if name not in learning}
    return SAEConfig(**own), LearningConfig(**{name: value for name, value in given.items() if name in learning})


class LearningSAE(SAE):
    """An SAE with its objective at hand."""

    def __init__(
        self,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
        **given: Any,
    ) -> None:
        """`given` are fields of SAEConfig and LearningConfig."""
        config, learning = split_fields(given)
        super().__init__(config, kernels=kernels, compute_dtype=compute_dtype, generator=generator)
        # Not a submodule: it holds this module.
        object.__setattr__(self, "objective", Objective(self, learning))
        self.objective.rule.start()

    @property
    def learning(self) -> LearningConfig:
        """How it is learnt."""
        return self.objective.learning

    @property
    def choices(self) -> SimpleNamespace:
        """All fields of both configs."""
        return SimpleNamespace(**asdict(self.config), **asdict(self.learning))

    def losses(self, x: Tensor, dead: Tensor | None = None, **options: Any) -> Losses:
        """Of rows that must be given back."""
        return self.objective.losses(x, inputs=StepInputs(dead=dead, **options))

    def facts(self, parts: list[Tensor], num_tokens: int) -> list[BatchFacts]:
        """Of a batch in parts, in one process."""
        return self.objective.facts(parts, num_tokens)

    def initialise(self, statistics: Any, sample: Tensor) -> None:
        """Starting values from data."""
        initialise(self.objective, None if statistics is None else [statistics], sample)
