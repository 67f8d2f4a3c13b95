"""The counter of dead latents."""

import torch

from shared.sae import SAE, DeadLatents, SAEConfig


def test_a_latent_dies_after_so_many_tokens_without_firing():
    dead = DeadLatents(4, 100)
    for _ in range(9):
        dead.update(torch.tensor([[0, -1], [1, 0]]), 10)
    assert dead.mask().tolist() == [False] * 4
    dead.update(torch.tensor([[0, -1]]), 10)
    assert dead.mask().tolist() == [False, False, True, True]
    assert float(dead.fraction()) == 0.5
    dead.update(torch.tensor([[3]]), 10)
    assert dead.mask().tolist() == [False, False, True, False]
    assert dead.tokens_since_fired.tolist() == [10, 20, 110, 0]


def test_slot_with_activation_zero_does_not_count_as_fired():
    sae = SAE(SAEConfig(d_model=1, d_latent=4, k=3, normalisation="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[-1.0], [2.0], [-3.0], [-4.0]]))
    dead = DeadLatents(4, 1)
    dead.update(sae.losses(torch.ones(5, 1)).latents.indices, 5)
    assert dead.mask().tolist() == [True, False, True, True]


def test_counts_are_global():
    # What two ranks would do, each with half of the batch and the other's firings merged in.
    local = [torch.tensor([[0], [1]]), torch.tensor([[2], [-1]])]
    fired = []
    for picks in local:
        recorder = DeadLatents(4, 1)
        recorder.update(picks, 4, lambda tensor: fired.append(tensor.clone()) or tensor)
    merged = torch.stack(fired).amax(0)
    ranks = [DeadLatents(4, 1) for _ in local]
    for rank, picks in zip(ranks, local, strict=True):
        rank.update(picks, 4, lambda tensor: torch.maximum(tensor, merged))
    single = DeadLatents(4, 1)
    single.update(torch.cat(local), 4)
    for rank in ranks:
        assert torch.equal(rank.tokens_since_fired, single.tokens_since_fired)


def test_state_round_trip():
    dead = DeadLatents(3, 10)
    dead.update(torch.tensor([[1]]), 7)
    other = DeadLatents(3, 10)
    other.load_state_dict(dead.state_dict())
    assert torch.equal(other.tokens_since_fired, dead.tokens_since_fired)
