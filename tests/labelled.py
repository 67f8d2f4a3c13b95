"""Planted tokens of known groups, codes and directions, for the supervised scores. N tokens, D width, F latents."""

import numpy as np
import torch

from shared.text.documents import Ints, Marks
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.material import Material
from stage_eval.supervised.sample import Sample, Task

DOCUMENTS = 12
"""In each half."""


def material(task: Task, x_ND: torch.Tensor, *, seed: int = 0, token_N: Ints | None = None) -> Material:
    """Tokens of two halves in turns, each of documents of about the same length."""
    count = len(x_ND)
    number = np.arange(count)
    sample = Sample(
        context_N=number * 0,
        position_N=number,
        token_N=number * 0 if token_N is None else token_N,
        is_test_N=number % 2 == 1,
        document_N=number // 2 % DOCUMENTS,
        documents=(DOCUMENTS, DOCUMENTS),
        tasks={task.name: task},
        left_out={},
    )
    return Material(sample, x_ND, x_ND, seed, torch.device("cpu"))


def codes(value_NF: torch.Tensor) -> Codes:
    """Sparse codes of dense ones; a slot of each token is padding."""
    fires = value_NF > 0
    widest = int(fires.sum(1).max()) + 1
    value_NK, index_NK = np.zeros((len(value_NF), widest)), np.full((len(value_NF), widest), -1)
    for row, (value_F, fires_F) in enumerate(zip(value_NF, fires, strict=True)):
        latents = fires_F.nonzero()[:, 0]
        value_NK[row, : len(latents)], index_NK[row, : len(latents)] = value_F[latents], latents
    return Codes(value_NK, index_NK, np.ones(len(value_NF)), value_NF.shape[1])


def concept(is_yes_N: Marks) -> Task:
    """A concept that these tokens are examples of."""
    return Task("concept planted", ("yes", "no"), np.where(is_yes_N, 0, 1))


def noise(*shape: int, seed: int = 0, scale: float = 0.01) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
