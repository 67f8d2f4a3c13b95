"""AuxK's share of very many dead latents: bounded, and in time all of them."""

import torch

from shared.sae.learn.dead import in_turn


def test_few_dead_latents_are_all_there() -> None:
    dead_R = torch.tensor([2, 3, 9])
    assert in_turn(dead_R, 3, turn=5) is dead_R


def test_many_take_turns_until_each_has_been_there() -> None:
    dead_R = torch.arange(0, 70, 7)
    seen: set[int] = set()
    for turn in range(4):
        now = in_turn(dead_R, 3, turn).tolist()
        assert len(now) == len(set(now)) == 3
        seen |= set(now)
    assert seen == set(dead_R.tolist())


def test_a_turn_is_a_function_of_its_number() -> None:
    dead_R = torch.arange(10)
    assert in_turn(dead_R, 4, 1).tolist() == [4, 5, 6, 7]
    assert in_turn(dead_R, 4, 2).tolist() == [8, 9, 0, 1]
