"""Groups by position and by token frequency."""

import numpy as np
import pytest
import torch

from shared.lm import segment_positions
from stage_eval.measure.breakdown import frequency_groups, position_groups, token_frequencies
from stage_eval.measure.downstream import scored_positions


@pytest.mark.parametrize("seq_len", [2, 3, 7, 512, 4096])
def test_every_position_has_one_group(seq_len: int) -> None:
    groups = position_groups(seq_len)
    bins = groups(np.arange(seq_len))
    assert (bins == 0).sum() == 1  # position 0 is alone
    assert (np.diff(bins) >= 0).all()
    assert set(bins.tolist()) == set(range(groups.num_bins))
    assert groups.edges[-1] == seq_len


def test_positions_split_at_the_edges() -> None:
    groups = position_groups(16)
    assert groups.edges.tolist() == [0, 1, 2, 3, 4, 6, 8, 11, 16]
    assert groups(np.array([3, 4, 5, 6, 10, 11, 15])).tolist() == [3, 4, 4, 5, 6, 7, 7]


def test_frequencies_outside_fall_into_the_ends() -> None:
    groups = frequency_groups()
    bins = groups(np.array([0.0, 1e-9, 2e-6, 0.05, 1.0]))
    assert bins.tolist() == [0, 0, 0, groups.num_bins - 3, groups.num_bins - 1]


def test_frequencies_count_only_evaluated_positions() -> None:
    tokens = np.array([[1, 5, 5, 2], [1, 5, 3, 0]], np.int32)
    counted = np.array([[False, True, True, True], [False, True, False, False]])
    assert token_frequencies(tokens, counted).tolist() == [0, 0, 0.25, 0, 0, 0.75]


def test_scored_positions_by_hand() -> None:
    #             BOS a  b  BOS c  d  pad
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    # BOS predicts a, a predicts b; b -> BOS is no prediction; BOS predicts c, c predicts d; d -> pad is none.
    assert scored_positions(mask, segments).tolist() == [[True, True, False, True, True, False, False]]
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 2, 0]]


def test_a_document_cut_without_bos_is_no_prediction() -> None:
    segments = torch.tensor([[0, 0, 1, 1]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert scored_positions(mask, segments).tolist() == [[True, False, True, False]]
