"""The counter of dead latents."""

import torch

from shared.sae.learn.dead import DeadLatents
from tests.learning import LearningSAE


def fired(*latents, num_latents=4):
    return torch.isin(torch.arange(num_latents), torch.tensor(latents))


def test_a_latent_dies_after_so_many_tokens_without_firing():
    dead = DeadLatents(4, 100)
    for _ in range(9):
        dead.update(fired(0, 1), 10)
    assert dead.mask().tolist() == [False] * 4
    dead.update(fired(0), 10)
    assert dead.mask().tolist() == [False, False, True, True]
    assert float(dead.fraction()) == 0.5
    dead.update(fired(3), 10)
    assert dead.mask().tolist() == [False, False, True, False]
    assert dead.tokens_since_fired.tolist() == [10, 20, 110, 0]


def test_slot_with_activation_zero_does_not_count_as_fired():
    sae = LearningSAE(d_model=1, d_latent=4, k=3, normalisation="none")
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[-1.0], [2.0], [-3.0], [-4.0]]))
    dead = DeadLatents(4, 1)
    dead.update(sae.losses(torch.ones(5, 1)).fired, 5)
    assert dead.mask().tolist() == [True, False, True, True]


def test_the_least_of_the_ranks_counts_is_the_global_one():
    steps = [((0, 1), (2,)), ((1,), ()), ((3,), (1, 2))]
    ranks, single = [DeadLatents(4, 1), DeadLatents(4, 1)], DeadLatents(4, 1)
    for step in steps:
        for rank, latents in zip(ranks, step, strict=True):
            rank.update(fired(*latents), 4)
        single.update(fired(*step[0], *step[1]), 4)
        merged = torch.minimum(ranks[0].tokens_since_fired, ranks[1].tokens_since_fired)
        assert torch.equal(merged, single.tokens_since_fired)


def test_state_round_trip():
    dead = DeadLatents(3, 10)
    dead.update(fired(1, num_latents=3), 7)
    other = DeadLatents(3, 10)
    other.load_state_dict(dead.state_dict())
    assert torch.equal(other.tokens_since_fired, dead.tokens_since_fired)
